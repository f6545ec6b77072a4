"""What is derived from the study: evolve.csv, hyp_evolve.yaml, evolve.png, and `starling search show`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from starling.cli.search import main
from starling.config.hyp import Hyp
from starling.config.yaml_reader import read_yaml
from starling.plots.search import plot_evolve
from starling.plots.style import lower_end
from starling.search.exports import CSV, PLOT, draw_plot, write_files
from starling.search.outcome import BEST_HYP, Candidate, Outcome, Report
from starling.search.study import SearchStudy
from starling.search.worker import WorkerSettings
from tests.searches import outcome, run_search, spec

SEED = Hyp(degrees=2.0, lr0=1e-05).as_dict()


def score(candidate: Candidate, report: Report) -> Outcome:
    """Let candidate 1 be the best of three."""
    fitness = 0.123456789 if candidate.number == 1 else 0.1
    return outcome(
        fitness, precision=0.9, recall=0.8, map50=0.7, map5095=fitness, box_loss=1, obj_loss=2, cls_loss=3
    )


@pytest.fixture
def searched(tmp_path: Path) -> Path:
    """Return the folder of a finished search."""
    run_search(tmp_path / "s", score, spec(SEED, 3))
    return tmp_path / "s"


def test_csv_has_the_seven_metrics_then_every_hyperparameter(searched: Path) -> None:
    with (searched / CSV).open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == [
        "metrics/precision", "metrics/recall", "metrics/mAP_0.5", "metrics/mAP_0.5:0.95",
        "val/box_loss", "val/obj_loss", "val/cls_loss", *SEED,
    ]  # fmt: skip
    assert len(rows) == 3
    assert [float(cell) for cell in rows[0][7:]] == list(SEED.values())
    assert rows[1][:7] == ["0.9", "0.8", "0.7", "0.123457", "1", "2", "3"]


def test_yaml_is_the_best_hyp_and_says_whose(searched: Path) -> None:
    best = SearchStudy.read(searched).finished()[1]
    assert Hyp.from_mapping(read_yaml(searched / BEST_HYP)).as_dict() == best.hyp
    head = (searched / BEST_HYP).read_text()
    assert head.startswith("# Best of 3 finished trainings (budget 3): candidate 1\n# fitness: 0.12346\n")
    assert "# metrics/mAP_0.5: 0.7\n" in head


def test_views_that_were_deleted_or_damaged_are_derived_anew(searched: Path) -> None:
    before = (searched / CSV).read_bytes()
    (searched / CSV).write_text("garbled")
    (searched / BEST_HYP).unlink()
    write_files(SearchStudy.read(searched))
    assert (searched / CSV).read_bytes() == before
    assert (searched / BEST_HYP).exists()


def test_nothing_is_written_before_a_candidate_has_finished(tmp_path: Path) -> None:
    study = SearchStudy.open_or_create(tmp_path, spec(SEED, 1))
    write_files(study)
    draw_plot(study)
    assert not (tmp_path / CSV).exists()


def test_plot_has_a_ring_around_the_best_in_every_panel(tmp_path: Path) -> None:
    seed = {
        "lr0": 0.01,
        "momentum": 0.9,
        "scale": 0.5,
        "fliplr": 0.5,
    }  # fliplr stays; few, as panels take time
    run_search(tmp_path, score, spec(seed, 3), settings=WorkerSettings())
    plot = cv2.imread(str(tmp_path / PLOT))[..., ::-1].astype(int)
    ring = (np.abs(plot - (0xD5, 0x5E, 0x00)).max(axis=-1) < 40).astype(np.uint8)
    blobs, _, boxes, _ = cv2.connectedComponentsWithStats(ring)
    wide = [box for box in boxes[1:blobs] if box[cv2.CC_STAT_WIDTH] > 15 and box[cv2.CC_STAT_HEIGHT] > 15]
    assert len(wide) == 3 + 1  # and one in the key


@pytest.mark.parametrize("fitness", [[0.3], [0.3, 0.3], [float("nan")], []])
def test_plot_of_few_or_no_results_is_drawn(tmp_path: Path, fitness: list[float]) -> None:
    plot_evolve({"lr0": [0.1] * len(fitness)}, fitness, tmp_path / "e.png")
    assert cv2.imread(str(tmp_path / "e.png")) is not None


def test_show_prints_a_table_and_json_and_changes_nothing(
    searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in searched.rglob("*"))
    assert main(["show", str(searched)]) == 0
    table = capsys.readouterr().out
    assert table.startswith("3/3 finished, 0 running, 0 failed\n")
    assert [line.split()[0] for line in table.splitlines() if line.endswith(" best")] == ["1"]
    assert main(["show", str(searched), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["best"]["number"] == 1
    assert sorted((path, path.stat().st_mtime_ns) for path in searched.rglob("*")) == before


def test_show_of_a_folder_without_a_search_is_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(tmp_path)]) == 2
    assert "holds no search" in capsys.readouterr().err


def test_collapsed_trainings_do_not_flatten_the_plot_and_an_ordinary_spread_is_shown_whole() -> None:
    ordinary = [0.30, 0.32, 0.33, 0.34, 0.36]
    assert lower_end(ordinary) == 0.30
    assert lower_end([*ordinary * 4, 0.001]) == pytest.approx(0.30 - 1.5 * 0.03)
    assert lower_end([0.5]) == 0.5


def test_what_never_changed_has_no_panel_unless_nothing_did(tmp_path: Path) -> None:
    moving = {f"g{n}": [0.1, 0.2] for n in range(6)}
    fixed = {f"f{n}": [1.0, 1.0] for n in range(6)}
    heights = []
    for number, hyps in enumerate(({**moving, **fixed}, moving, {**moving, "g6": [1.0, 2.0]}, fixed)):
        plot_evolve(hyps, [0.3, 0.4], tmp_path / f"{number}.png")
        heights.append(cv2.imread(str(tmp_path / f"{number}.png")).shape[0])
    assert heights[0] == heights[1] == heights[3] < heights[2]
