"""Every command works with an anchor-free layout as with one that has anchors."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from starling import settings
from starling.cli import detect, export, train, val
from starling.config.yaml_reader import read_yaml
from tests.conftest import MINI_SET, REPOSITORY, TINY_LAYOUT

LAYOUT = REPOSITORY / "tests" / "tiny-u.yaml"


@pytest.fixture(autouse=True)
def no_tracking(runs: Path) -> None:
    """Keep the bridges out: they have tests of their own."""
    settings.update({"mlflow": False, "tensorboard": False})


@pytest.fixture
def free_args(tiny_args: list[str]) -> list[str]:
    """Return the flags of a training of an anchor-free layout that takes about a second."""
    return [str(LAYOUT) if word == str(TINY_LAYOUT) else word for word in tiny_args]


def columns(path: Path) -> list[str]:
    return path.read_text().splitlines()[0].split(",")


def test_train_val_detect_and_export_take_an_anchor_free_layout(
    free_args: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(free_args) == 0
    run = runs / "train" / "exp"
    assert columns(run / "results.csv")[1:4] == ["train/box_loss", "train/cls_loss", "train/dfl_loss"]
    assert "val/dfl_loss" in columns(run / "results.csv")
    hyp = read_yaml(run / "hyp.yaml")
    assert (hyp["box"], hyp["cls"], hyp["dfl"]) == (7.5, 0.5, 1.5)
    assert not {"obj", "anchor_t", "iou_t", "fl_gamma"} & set(hyp)
    assert (run / "results.png").is_file()
    out = capsys.readouterr().out
    assert "AutoAnchor" not in out
    assert "dfl" in out

    weights, data = str(run / "weights" / "best.pt"), free_args[1]
    assert val.main(["--weights", weights, "--data", data, "--img", "64", "--augment", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 4
    source = str(MINI_SET / "images" / "val")
    assert detect.main(["--weights", weights, "--source", source, "--img", "64", "--nosave"]) == 0
    assert (
        export.main(["--weights", weights, "--img", "64", "--include", "onnx", "torchscript", "--dynamic"])
        == 0
    )
    assert "[1, 7, 80]: x, y, width, height in pixels, class scores" in capsys.readouterr().out


def test_an_anchor_free_and_an_anchor_based_detector_make_one_ensemble(
    free_args: list[str], tiny_args: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, args in (("free", free_args), ("anchors", tiny_args)):
        assert train.main([*args, "--epochs", "1", "--name", name, "--noplots"]) == 0
    weights = [str(runs / "train" / name / "weights" / "best.pt") for name in ("free", "anchors")]
    assert val.main(["--weights", *weights, "--data", free_args[1], "--img", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 4


@pytest.mark.parametrize(
    "flags",
    [
        ["--freeze", "4"], ["--quad"], ["--multi-scale"], ["--rect"], ["--image-weights"], ["--single-cls"],
        ["--optimizer", "AdamW", "--cos-lr"],
    ],
    ids=lambda flags: flags[0],
)  # fmt: skip
def test_flags_of_a_training_work_with_an_anchor_free_layout(
    free_args: list[str], runs: Path, flags: list[str]
) -> None:
    assert train.main([*free_args, "--epochs", "1", "--noplots", *flags]) == 0
    assert (runs / "train" / "exp" / "weights" / "best.pt").is_file()


def test_fine_tuning_from_an_anchor_free_checkpoint_takes_its_layout_and_gains(
    free_args: list[str], runs: Path
) -> None:
    assert train.main([*free_args, "--epochs", "1", "--noplots"]) == 0
    best = runs / "train" / "exp" / "weights" / "best.pt"
    flags = [
        "--data",
        free_args[1],
        "--img",
        "64",
        "--batch",
        "4",
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--noplots",
    ]
    assert train.main([*flags, "--weights", str(best), "--name", "tuned"]) == 0
    assert read_yaml(runs / "train" / "tuned" / "hyp.yaml")["dfl"] == 1.5


@pytest.mark.parametrize(
    ("layout", "hyp", "remedy"),
    [
        (LAYOUT, "hyp.VOC.yaml", "hyp.u-scratch.yaml"),
        (TINY_LAYOUT, "hyp.u-scratch.yaml", "hyp.scratch-low.yaml"),
    ],
)
def test_hyperparameters_of_the_other_kind_of_layout_are_exit_2(
    tiny_args: list[str], runs: Path, capsys: pytest.CaptureFixture[str], layout: Path, hyp: str, remedy: str
) -> None:
    args = [str(layout) if word == str(TINY_LAYOUT) else word for word in tiny_args]
    assert train.main([*args, "--hyp", hyp]) == 2
    assert remedy in capsys.readouterr().err
    assert not (runs / "train").exists()


def test_a_search_of_an_anchor_free_layout_has_genes_of_its_own(free_args: list[str], runs: Path) -> None:
    flags = [*free_args, "--epochs", "1", "--evolve", "3", "--project", "p", "--name", "s", "--noplots"]
    assert train.main(flags) == 0
    with open(runs / "p" / "s" / "evolve.csv") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 3
    assert len({row["dfl"] for row in table}) > 1 or len({row["box"] for row in table}) > 1
    assert not {"obj", "anchor_t", "iou_t", "fl_gamma"} & set(table[0])
    assert [name for name in table[0] if name.startswith("val/")] == [
        "val/box_loss",
        "val/cls_loss",
        "val/dfl_loss",
    ]
    assert read_yaml(runs / "p" / "s" / "hyp_evolve.yaml")["dfl"] > 0


def test_a_search_over_layouts_with_and_without_anchors_is_exit_2(
    free_args: list[str], runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(f"lr0: {{lower: 0.001, upper: 0.1}}\ncfg: [{LAYOUT}, {TINY_LAYOUT}]\n")
    assert (
        train.main([*free_args, "--evolve", "2", "--space", str(space), "--project", "p", "--name", "s"]) == 2
    )
    said = capsys.readouterr().err
    assert "anchor-free" in said
    assert str(TINY_LAYOUT) in said
    assert not (runs / "p").exists()


@pytest.mark.slow
def test_two_processes_train_an_anchor_free_layout_together(free_args: list[str], runs: Path) -> None:
    command = [sys.executable, "app/train.py", *free_args[:-1], "cpu,cpu", "--noplots"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    assert "dfl" in done.stdout
