"""`starling search import`: an old evolve.csv becomes history of a search, and nothing else of it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from starling.cli.search import main
from starling.config.hyp import Hyp
from starling.config.yaml_reader import write_yaml
from starling.core.errors import UsageError
from starling.search.exports import METRIC_COLUMNS, write_files
from starling.search.importing import read_evolve_csv
from starling.search.study import LeasedCandidate, SearchStudy
from tests.conftest import REPOSITORY
from tests.searches import outcome, spec
from tests.unit.search.test_worker import search as work

SEED = Hyp(degrees=2.0, mixup=0.1).as_dict()
GENES = [name for name in SEED if name != "label_smoothing"]
HEADER = [*METRIC_COLUMNS.values(), *GENES]


def padded(cells: Sequence[object]) -> str:
    """Return a line as the classic trainer pads it: 20 characters a cell."""
    return ",".join(f"{cell:>20}" if isinstance(cell, str) else f"{cell:>20.5g}" for cell in cells) + "\n"


def old_row(fitness: float, **hyp: float) -> list[float]:
    """Return a finished training of an old search; mAP50 and mAP50-95 are the fitness."""
    return [
        0.9,
        0.8,
        fitness,
        fitness,
        0.1,
        0.2,
        0.3,
        *{**{name: SEED[name] for name in GENES}, **hyp}.values(),
    ]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Return the evolve.csv of an old search of three trainings, with its opt.yaml."""
    folder = tmp_path / "old"
    folder.mkdir()
    rows = [old_row(0.4), old_row(0.9, fliplr=0.25), old_row(0.4, lr0=0.03)]
    (folder / "evolve.csv").write_text(padded(HEADER) + "".join(map(padded, rows)))
    write_yaml(folder / "opt.yaml", {"epochs": 10, "imgsz": 300, "weights": "yolov5s.pt", "evolve": 3})
    return folder / "evolve.csv"


@pytest.fixture
def study(tmp_path: Path) -> SearchStudy:
    """Return a search at 320 pixels whose first candidate has finished."""
    study = SearchStudy.open_or_create(
        tmp_path / "s", spec(SEED, 3, sampler="classic", signature={"epochs": 10, "image_size": 320})
    )
    claim = study.ask("w")
    assert isinstance(claim, LeasedCandidate)
    study.finish(claim, outcome(0.4))
    return study


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_imported_results_are_parents_and_neither_candidates_nor_budget(
    old: Path, study: SearchStudy
) -> None:
    assert run("import", old, "--to", study.directory) == 0
    assert (study.progress().finished, study.progress().best_fitness) == (1, 0.4)
    assert [c.number for c in study.finished()] == [a.number for a in study.attempts()] == [0]
    assert study.imported() == 3
    write_files(study)
    with (study.directory / "evolve.csv").open() as file:
        assert len(list(csv.reader(file))) == 2
    claim = study.ask("w")
    assert isinstance(claim, LeasedCandidate)
    assert claim.candidate.hyp["fliplr"] == 0.25, (
        "a mutant of the best old result: this gene is passed on as it is"
    )
    study.finish(claim, outcome(0.3))
    assert study.progress().finished == 2


def test_the_budget_is_met_by_this_searchs_own_trainings(old: Path, tmp_path: Path) -> None:
    signature = {"epochs": 10, "image_size": 320}
    work(tmp_path / "s", budget=1, signature=signature)
    assert run("import", old, "--to", tmp_path / "s") == 0
    summary = work(tmp_path / "s", budget=4, signature=signature)
    assert summary.progress.finished == 4
    assert summary.trained_here == 3


def test_the_same_import_twice_adds_nothing(
    old: Path, study: SearchStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("import", old, "--to", study.directory) == 0
    assert "3 of 3 results imported\n" in capsys.readouterr().out
    copy = old.rename(old.with_name("copy.csv"))
    assert run("import", copy, "--to", study.directory, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["imported"], said["already_there"], study.imported()) == (0, 3, 3)


def test_each_imported_result_says_which_line_it_was(old: Path, study: SearchStudy) -> None:
    run("import", old, "--to", study.directory)
    records = (study.directory / "study.journal").read_text()
    assert [f"evolve.csv:{line}" in records for line in (1, 2, 3, 4, 5)] == [False, True, True, True, False]


@pytest.mark.parametrize(
    ("options", "differences"),
    [
        ({"epochs": 300, "imgsz": 320}, ["epochs: 10 in the study, 300 in the file"]),
        ({"epochs": 10, "imgsz": 640}, ["imgsz: 320 in the study, 640 in the file"]),
        ({"epochs": 9, "imgsz": [96, 96]}, ["epochs: 10", "imgsz: 320"]),
    ],
)
def test_other_epochs_or_sizes_are_refused_with_the_difference(
    options: dict[str, object],
    differences: list[str],
    old: Path,
    study: SearchStudy,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_yaml(old.with_name("opt.yaml"), options)
    assert run("import", old, "--to", study.directory) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1
    assert all(difference in said for difference in differences)
    assert study.imported() == 0


def test_without_an_opt_yaml_the_flags_say_it_and_may_not_contradict_one(
    old: Path, study: SearchStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("import", old, "--to", study.directory, "--epochs", 11) == 2
    assert "opt.yaml says 10" in capsys.readouterr().err
    old.with_name("opt.yaml").unlink()
    assert run("import", old, "--to", study.directory, "--epochs", 10) == 2
    assert "give --imgsz" in capsys.readouterr().err
    assert run("import", old, "--to", study.directory, "--epochs", 10, "--imgsz", 320) == 0


def test_rows_that_this_search_could_not_have_drawn_are_left_out_with_the_reason(
    old: Path, study: SearchStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    header = [*HEADER, "label_smoothing"]
    rows = [[*old_row(0.5), 0.1], [*old_row(0.6, lr0=0.5), 0.0], [*old_row(0.7, lr0=0.04), 0.0]]
    old.write_text(padded(header) + "".join(map(padded, rows)))
    assert run("import", old, "--to", study.directory) == 0
    said = capsys.readouterr().out
    assert f"{old}:2: label_smoothing=0.1, which is 0 throughout" in said
    assert f"{old}:3: lr0=0.5 lies outside" in said
    assert "1 of 3 results imported" in said


@pytest.mark.parametrize(
    ("content", "where", "what"),
    [
        ("", "", "is empty"),
        (padded(HEADER), "", "no results"),
        ("a,b,c\n1,2,3\n", ":1", "not the header"),
        (padded([*HEADER[:7], "lr00"]) + "1\n", ":1", "did you mean 'lr0'"),
        (padded([*HEADER, "lr0"]) + "1\n", ":1", "stands twice"),
        (padded(HEADER) + "1,2,3\n", ":2", "3 cells under"),
        (padded(HEADER) + padded(old_row(0.5)) + "\n" + padded(old_row(0.5, lr0=float("nan"))), ":4", "lr0 is nan"),
        (padded(HEADER) + padded(old_row(0.5)).replace("0.9", "x.9", 1), ":2", "precision is 'x.9'"),
        (padded(HEADER) + padded(old_row(1.5)), ":2", "outside [0, 1]"),
        (padded(HEADER) + '"1', ":2", "not a row"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_evolve_csv_is_one_message_with_its_line(
    content: str, where: str, what: str, old: Path
) -> None:
    old.write_text(content)
    with pytest.raises(UsageError) as caught:
        read_evolve_csv(old)
    assert str(caught.value).startswith(f"{old}{where}: ")
    assert what in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\x00", b"PK\x03\x04\x89\xff"])
def test_bytes_that_are_no_text_are_exit_2(content: bytes, old: Path, study: SearchStudy) -> None:
    old.write_bytes(content)
    assert run("import", old, "--to", study.directory) == 2
    assert run("import", old.parent, "--to", study.directory) == 2
    assert run("import", old.with_name("gone.csv"), "--to", study.directory) == 2


def test_a_file_without_a_column_for_a_gene_of_the_search_is_refused(
    old: Path, study: SearchStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    text = old.read_text().splitlines()
    old.write_text("\n".join(line.rsplit(",", 1)[0] for line in text))
    assert run("import", old, "--to", study.directory) == 2
    assert "no column for copy_paste" in capsys.readouterr().err


def test_a_search_without_a_candidate_yet_is_told_to_begin_first(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    signature = {"epochs": 10, "image_size": 320}
    SearchStudy.open_or_create(tmp_path / "s", spec(SEED, 1, signature=signature))
    assert run("import", old, "--to", tmp_path / "s") == 2
    assert "start a worker first" in capsys.readouterr().err
    assert run("import", old, "--to", tmp_path / "nothing") == 2


def test_an_import_while_workers_ask_gives_nobody_the_same_number(old: Path, tmp_path: Path) -> None:
    signature = {"epochs": 10, "image_size": 320}
    directory = tmp_path / "s"
    work(directory, budget=1, signature=signature)
    worker = threading.Thread(target=lambda: work(directory, budget=25, signature=signature))
    worker.start()
    assert run("import", old, "--to", directory) == 0
    worker.join()
    study = SearchStudy.read(directory)
    assert study.progress().finished == 25
    assert study.imported() == 3
    assert len({candidate.number for candidate in study.finished()}) == 25


def test_our_own_evolve_csv_can_be_imported_into_the_next_search(
    old: Path, study: SearchStudy, tmp_path: Path
) -> None:
    write_files(study)
    signature = {"epochs": 10, "image_size": 320}
    work(tmp_path / "next", budget=1, signature=signature)
    csv_file = study.directory / "evolve.csv"
    assert run("import", csv_file, "--to", tmp_path / "next", "--epochs", 10, "--imgsz", 320) == 0
    assert SearchStudy.read(tmp_path / "next").imported() == 1


def test_help_is_there_without_optuna() -> None:
    code = (
        "import sys; from starling.cli.search import build_parser; build_parser().format_help();"
        "sys.exit('optuna' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_show_and_report_know_what_was_imported(
    old: Path, study: SearchStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    run("import", old, "--to", study.directory)
    capsys.readouterr()
    assert run("show", study.directory) == 0
    assert capsys.readouterr().out.startswith("1/3 finished, 0 running, 0 failed, 3 imported\n")
    assert run("report", study.directory, "--json") == 0
    page = Path(json.loads(capsys.readouterr().out)["report"])
    assert "imported results" in page.read_text()
