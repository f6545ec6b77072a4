"""Classes of equal names are counted apart, and a class without labels is told of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from starling.cli.detect import main as detect_main
from starling.cli.val import main as val_main
from starling.evaluation.validator import class_figures, class_table
from starling.metrics import average_precision
from starling.outputs.names import distinct
from starling.plots.style import figure_names
from tests.conftest import CELL_DETECTOR, MINI_SET

WEIGHTS = str(CELL_DETECTOR)
IMAGE = min((MINI_SET / "images" / "val").glob("*.jpg"))


def test_only_names_that_are_not_unique_get_their_numbers() -> None:
    assert distinct(("a", "b", "c")) == ("a", "b", "c")
    assert distinct(("cell", "b", "cell")) == ("cell 0", "b", "cell 2")
    assert distinct(("cell", "cell", "cell 0")) == ("cell 0 0", "cell 1", "cell 0")
    assert distinct(("", "")) == (" 0", " 1")
    assert distinct(("background", "a"), reserved=("background",)) == ("background 0", "a")


def test_names_that_are_equal_once_shortened_or_cannot_be_drawn_differ_in_figures() -> None:
    long = [f"vehicle of the {kind} kind and of some length" for kind in ("first", "second", "third")]
    undrawable = ["\u8eca\u8f1b\u8eca", "\u4eba\u7269\u4eba"]
    names = figure_names([*long, *undrawable, "plain"], longest=18, classes=[3, 5, 8, 13, 21, 34])
    assert len(set(names)) == 6
    assert names[3:] == ["class 13", "class 21", "plain"]


def metrics_of_class_1() -> tuple[list[str], list[dict[str, object]]]:
    metrics = average_precision(
        np.ones((2, 10), bool), np.array([0.9, 0.8]), np.array([1.0, 1.0]), np.array([1.0, 1.0])
    )
    names = ("none", "some", "none too")
    return class_table(metrics, names), class_figures(metrics, names)


def test_a_class_without_labels_has_a_row_without_figures_and_counts_in_no_mean() -> None:
    lines, figures = metrics_of_class_1()
    assert [line.split()[-5:] for line in lines[1:]] == [
        ["2", "1.000", "1.000", "0.995", "0.995"],
        ["0", "-", "-", "-", "-"],
        ["2", "1.000", "1.000", "0.995", "0.995"],
        ["0", "-", "-", "-", "-"],
    ]
    assert len({len(line) for line in lines}) == 1
    assert [row["labels"] for row in figures] == [0, 2, 0]
    assert figures[0]["mAP50_95"] is None
    assert figures[1]["mAP50_95"] == pytest.approx(0.995, abs=1e-3)


def test_counts_of_classes_of_equal_names_add_up_to_the_detections(
    tmp_path: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "equal.yaml"
    data.write_text("path: .\ntrain: x\nnames: [cell, cell, platelet]\n")
    flags = [
        "--weights",
        WEIGHTS,
        "--device",
        "cpu",
        "--json",
        "--imgsz",
        "128",
        "--conf-thres",
        "0.2",
        "--nosave",
    ]
    assert detect_main([*flags, "--source", str(IMAGE), "--data", str(data)]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"cell 0", "cell 1"} <= told["classes"].keys() <= {"cell 0", "cell 1", "platelet"}
    assert sum(told["classes"].values()) == told["detections"]


def test_validation_tells_its_batch_and_every_class_by_number(
    tmp_path: Path, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("starling.evaluation.evaluation.draw_worst", lambda *args: None)
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    shutil.copyfile(IMAGE, tmp_path / "images" / "a.jpg")
    (tmp_path / "labels" / "a.txt").write_text("1 .5 .5 .2 .2\n")
    data = tmp_path / "data.yaml"
    data.write_text("path: .\ntrain: images\nval: images\nnames: [RBC, WBC, Platelets]\n")
    flags = [
        "--weights",
        WEIGHTS,
        "--data",
        str(data),
        "--img",
        "96",
        "--device",
        "cpu",
        "--batch",
        "3",
        "--json",
    ]
    assert val_main(flags) == 0, capsys.readouterr().err
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["batch"], told["imgsz"]) == (3, 96)
    assert [(row["class"], row["name"], row["labels"]) for row in told["classes"]] == [
        (0, "RBC", 0),
        (1, "WBC", 1),
        (2, "Platelets", 0),
    ]
    assert told["classes"][0]["mAP50"] is None
    assert told["classes"][1]["mAP50"] is not None
