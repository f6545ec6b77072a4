"""A validation from its command line to its files, with weights that find something."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from starling import device
from starling.cli import train, val
from starling.core.settings.val import parse_args
from starling.data.dataset.dataset import Dataset, DatasetDescription
from starling.evaluation import evaluation
from starling.evaluation.coco import CocoPredictions, image_ids
from starling.evaluation.evaluation import cut_list
from starling.evaluation.mistakes import WorstImages
from starling.evaluation.validator import ScoredImage
from starling.metrics import find_mistakes
from starling.model.checkpoint import save_checkpoint
from starling.model.detector import build_detector
from starling.prediction.inference import Augmented, Ensemble, SingleClass
from starling.training.setup import data as engine_data
from tests.conftest import CELL_DETECTOR, MINI_SET, REPOSITORY, TINY_LAYOUT

IMAGES = ["confusion_matrix.png", "PR_curve.png", "F1_curve.png", "P_curve.png", "R_curve.png", "worst.jpg",
            "val_batch0_labels.jpg", "val_batch0_pred.jpg"]  # fmt: skip


@pytest.fixture
def no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the drawing out where it is not what is tested: it takes longer than the validation."""
    monkeypatch.setattr(evaluation.plots, "draw_validation", lambda *given: None)
    monkeypatch.setattr(evaluation, "draw_worst", lambda *given: None)


@pytest.fixture
def real_args(tiny_data: Path) -> list[str]:
    """Return the flags of a validation of real weights on four images."""
    return [
        "--weights",
        str(CELL_DETECTOR),
        "--data",
        str(tiny_data),
        "--img",
        "224",
        "--device",
        "cpu",
        "--json",
    ]


def report_of(args: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run val.py and return the JSON of its last line."""
    capsys.readouterr()
    assert val.main(args) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return report


def own_checkpoint(path: Path, names: tuple[str, ...]) -> Path:
    """Write fresh weights of the tiny layout in our own format."""
    detector = build_detector(TINY_LAYOUT, len(names), names=names)
    content = {
        "kind": "weights",
        "ema": detector.state_dict(),
        "layout": detector.layout,
        "names": list(names),
    }
    save_checkpoint(path, content)
    return path


# --- a whole validation ---------------------------------------------------------------------------------


def test_validation_of_real_weights_agrees_with_pycocotools_and_writes_every_file(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = report_of(
        ["--weights", str(CELL_DETECTOR), "--data", str(MINI_SET / "bccd.yaml"), "--img", "320", "--device", "cpu",
         "--save-txt", "--save-conf", "--save-json", "--json"], capsys)  # fmt: skip
    folder = runs / "val" / "exp"
    assert report["run"] == str(folder)
    assert report["mAP50"] > 0.6
    assert report["coco"]["mAP50"] == pytest.approx(report["mAP50"], abs=0.01)
    assert report["coco"]["mAP50_95"] == pytest.approx(report["mAP50_95"], abs=0.01)
    assert not [name for name in IMAGES if not (folder / name).is_file()]
    stems = {path.stem for path in (MINI_SET / "images" / "val").iterdir()}
    assert {path.stem for path in (folder / "labels").iterdir()} == stems
    rows = np.concatenate([np.loadtxt(path, ndmin=2) for path in (folder / "labels").iterdir()])
    assert rows.shape[1] == 6
    assert ((rows[:, 1:] >= 0) & (rows[:, 1:] <= 1)).all()
    found = json.loads((folder / "cells_predictions.json").read_text())
    assert len(found) == len(rows)
    assert set(found[0]) == {"image_id", "category_id", "bbox", "score"}
    assert {row["image_id"] for row in found} <= stems


def test_what_train_wrote_is_what_val_reads(
    tiny_args: list[str], tiny_data: Path, runs: Path, no_images: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*tiny_args, "--epochs", "1", "--noplots"]) == 0
    best = runs / "train" / "exp" / "weights" / "best.pt"
    report = report_of(
        ["--weights", str(best), "--data", str(tiny_data), "--img", "64", "--device", "cpu", "--json"], capsys
    )
    assert {"precision", "recall", "mAP50", "mAP50_95"} <= report.keys()
    assert report["images"] == 4


def test_hybrid_labels_hold_every_label_and_leave_the_metrics_alone(
    real_args: list[str],
    tiny_data: Path,
    runs: Path,
    no_images: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = report_of(real_args, capsys)
    hybrid = report_of([*real_args, "--save-hybrid", "--save-conf", "--name", "hybrid"], capsys)
    assert hybrid["mAP50_95"] == plain["mAP50_95"]
    for path in (runs / "val" / "hybrid" / "labels").iterdir():
        written = np.loadtxt(path, ndmin=2)
        labels = np.loadtxt(tiny_data.parent / "labels" / "val" / path.name, ndmin=2)
        assert written[written[:, 5] == 1][:, :5] == pytest.approx(labels, abs=1e-4)
        assert len(written) > len(labels)


def test_max_det_and_conf_thres_bound_what_is_found_and_the_figures_say_so(
    real_args: list[str], runs: Path, no_images: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert val.main([*real_args, "--max-det", "1", "--conf-thres", "0.5", "--save-txt", "--save-conf"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cut = json.loads(lines[-1])["cut_list"]
    assert cut in lines
    assert "confidence 0.5" in cut
    assert "1 detections an image, and images with more labels than that: 4" in cut
    files = list((runs / "val" / "exp" / "labels").iterdir())
    rows = [line.split() for path in files for line in path.read_text().splitlines()]
    assert 0 < len(rows) <= len(files) == 4
    assert all(float(row[5]) > 0.5 for row in rows)


def test_figures_of_a_whole_list_of_detections_say_nothing_of_a_cut_one(tiny_data: Path) -> None:
    data = Dataset.load(DatasetDescription.from_yaml(tiny_data), "val")
    most = max(map(len, data.labels))
    assert cut_list(data, 0.01, most) is None
    assert "0.011" in str(cut_list(data, 0.011, most))
    assert "more labels than that: 1 (" in str(cut_list(data, 0.001, sorted(map(len, data.labels))[-2]))


def test_a_training_says_that_its_own_validation_scores_a_cut_list(
    tiny_args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_data, "MAX_DETECTIONS", 2)
    assert train.main([*tiny_args, "--epochs", "1", "--noplots", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"val: {json.loads(lines[-1])['cut_list']}" in lines
    assert sum("cut list" in line for line in lines) == 2


def test_an_ensemble_of_one_model_twice_scores_as_the_model_alone(
    real_args: list[str], no_images: None, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = report_of(real_args, capsys)
    twice = report_of([*real_args, "--weights", str(CELL_DETECTOR), str(CELL_DETECTOR)], capsys)
    assert twice["mAP50"] == pytest.approx(alone["mAP50"], abs=1e-3)


def test_augmented_validation_scores_near_the_plain_one_yet_not_the_same(
    real_args: list[str], no_images: None, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, augmented = report_of(real_args, capsys), report_of([*real_args, "--augment"], capsys)
    assert augmented["mAP50"] == pytest.approx(plain["mAP50"], abs=0.1)
    assert augmented["mAP50_95"] != plain["mAP50_95"]


def test_single_cls_scores_a_model_of_several_classes_as_one_of_one(
    real_args: list[str], no_images: None, capsys: pytest.CaptureFixture[str]
) -> None:
    report = report_of([*real_args, "--single-cls", "--save-json"], capsys)
    assert report["mAP50"] > 0.6
    assert report["coco"]["mAP50"] == pytest.approx(report["mAP50"], abs=0.01)


def test_speed_tells_milliseconds_an_image_of_each_stage(
    real_args: list[str], no_images: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert val.main([*real_args, "--task", "speed"]) == 0
    out = capsys.readouterr().out
    assert "ms an image: pre-process" in out
    times = json.loads(out.splitlines()[-1])["ms_per_image"]
    assert list(times) == ["pre-process", "inference", "NMS"]
    assert all(value > 0 for value in times.values())


def test_a_study_writes_a_table_for_each_of_the_weights_and_one_image(
    tmp_path: Path,
    tiny_data: Path,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluation.STUDY_SIZES[0] == 256
    assert evaluation.STUDY_SIZES[-1] == 1536
    monkeypatch.setattr(evaluation, "STUDY_SIZES", (64, 96))
    weights = [str(own_checkpoint(tmp_path / name / "best.pt", ("RBC", "WBC", "Platelets"))) for name in "ab"]
    report = report_of(
        ["--weights", *weights, "--data", str(tiny_data), "--task", "study", "--device", "cpu", "--json"],
        capsys,
    )
    folder = runs / "val" / "exp"
    for name in ("study_bccd_best.txt", "study_bccd_best_2.txt"):
        table = np.loadtxt(folder / name)
        assert table[:, 0].tolist() == [64, 96]
        assert table.shape == (2, 8)
    assert (folder / "study.png").is_file()
    assert report["imgsz"] in (64, 96)


def test_a_study_of_a_cut_list_of_detections_says_so(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluation, "STUDY_SIZES", (64,))
    weights = own_checkpoint(tmp_path / "best.pt", ("RBC", "WBC", "Platelets"))
    flags = ["--weights", str(weights), "--data", str(tiny_data), "--task", "study", "--max-det", "1"]
    assert val.main([*flags, "--device", "cpu", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cut = json.loads(lines[-1])["cut_list"]
    assert cut in lines
    assert "1 detections an image" in cut


# --- what cannot work -----------------------------------------------------------------------------------


def test_weights_of_other_classes_than_the_datasets_are_refused_with_both_lists(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = own_checkpoint(tmp_path / "pets.pt", ("cat", "dog"))
    assert val.main(["--weights", str(weights), "--data", str(tiny_data), "--device", "cpu"]) == 4
    error = capsys.readouterr().err
    assert "cat, dog" in error
    assert "RBC, WBC, Platelets" in error


def test_an_ensemble_of_models_of_different_classes_is_refused(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = own_checkpoint(tmp_path / "pets.pt", ("cat", "dog"))
    assert (
        val.main(["--weights", str(CELL_DETECTOR), str(weights), "--data", str(tiny_data), "--device", "cpu"])
        == 4
    )
    assert "ensemble" in capsys.readouterr().err


def test_a_split_that_the_dataset_does_not_have_is_a_data_error(
    real_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert val.main([*real_args, "--task", "test"]) == 3
    assert "has no `test:`" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args", [["--conf-thres", "2"], ["--max-det", "0"], ["--task", "walk"], ["--iou", "-1"], ["--rect"]]
)
def test_a_flag_that_cannot_work_is_refused_before_torch_is_needed(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert val.main(args) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_half_on_hardware_without_bfloat16_is_said(
    real_args: list[str],
    no_images: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(device, "cpu_has_bfloat16", lambda: False)
    assert val.main([*real_args, "--half"]) == 0
    assert "--half: this hardware has no bfloat16" in capsys.readouterr().out


# --- the command line -----------------------------------------------------------------------------------


def test_speed_has_the_thresholds_of_detection_unless_told_otherwise() -> None:
    assert (parse_args(["--task", "speed"]).conf_thres, parse_args(["--task", "speed"]).iou_thres) == (
        0.25,
        0.45,
    )
    assert parse_args(["--task", "speed", "--conf", "0.1"]).conf_thres == 0.1
    assert (parse_args([]).conf_thres, parse_args([]).iou_thres, parse_args([]).max_det) == (0.001, 0.6, 300)


def test_help_answers_in_the_classic_folder_without_torch() -> None:
    script = "import sys, runpy\nsys.argv = ['val.py', '--help']\ntry:\n    runpy.run_path('val.py', run_name='__main__')\n"
    script += "except SystemExit as end:\n    assert not end.code\nassert 'torch' not in sys.modules"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY / "app", capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "--save-hybrid" in run.stdout


# --- models as wrappers ---------------------------------------------------------------------------------


class SpotFinder(nn.Module):
    """A predictor that finds the brightest spot of each image, 20 x 10 pixels at scale 1."""

    names = ("a", "b")
    nc = 2
    image_multiple = 32

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        self.seen.append(tuple(images.shape[2:]))
        grey = images.mean(1)
        total = grey.sum((1, 2))
        ys, xs = torch.arange(grey.shape[1]) + 0.5, torch.arange(grey.shape[2]) + 0.5
        x, y = (grey.sum(1) * xs).sum(1) / total, (grey.sum(2) * ys).sum(1) / total
        rows = [x, y, x * 0 + 20, y * 0 + 10, x * 0 + 1, x * 0 + 0.3, x * 0 + 0.7]
        return torch.stack(rows, dim=1)[:, None], None


def image_with_spot(x: int, y: int) -> Tensor:
    image = torch.zeros(1, 3, 192, 320)
    image[:, :, y - 6 : y + 6, x - 6 : x + 6] = 1
    return image


def test_every_view_of_augmentation_finds_a_spot_at_the_same_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starling.prediction.inference.FILL", 0)  # padding would count as light
    finder = SpotFinder()
    decoded, raw = Augmented(finder)(image_with_spot(90, 60))
    assert raw is None
    assert decoded.shape == (1, 3, 7)
    assert decoded[0, :, :2].tolist() == pytest.approx(np.array([[90, 60]] * 3), abs=1.0)
    assert decoded[0, :, 2].tolist() == pytest.approx([20, 20 / 0.83, 20 / 0.67])
    assert finder.seen == [(192, 320), (160, 288), (128, 224)]


def test_an_ensemble_gives_the_boxes_of_all_and_a_single_class_the_best_score() -> None:
    image = image_with_spot(90, 60)
    assert Ensemble(SpotFinder(), SpotFinder())(image)[0].shape == (1, 2, 7)
    merged = SingleClass(SpotFinder(), "item")
    assert merged.nc == 1
    assert merged(image)[0][0, 0, 4:].tolist() == pytest.approx([1, 0.7])


# --- mistakes and COCO ----------------------------------------------------------------------------------

LABELS = torch.tensor([[0, 0, 0, 10, 10], [1, 50, 50, 60, 60], [0, 80, 80, 90, 90]], dtype=torch.float32)


def found(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)


def test_mistakes_are_labels_not_met_and_detections_that_meet_none() -> None:
    detections = found(
        (0, 0, 10, 10, 0.9, 0), (1, 0, 10, 10, 0.8, 0), (50, 50, 60, 60, 0.7, 0), (80, 80, 90, 91, 0.6, 0)
    )
    missed, false = find_mistakes(detections, LABELS)
    assert missed.tolist() == [False, True, False]  # the second is found as another class
    assert false.tolist() == [False, True, True, False]  # a second box on one label is false
    missed, false = find_mistakes(found(), LABELS)
    assert missed.all()
    assert not len(false)


def test_the_worst_images_come_first_and_faint_detections_do_not_count() -> None:
    worst = WorstImages(limit=2)
    worst.add(ScoredImage(0, (100, 100), LABELS, found((0, 0, 10, 10, 0.9, 0))))
    worst.add(ScoredImage(1, (100, 100), LABELS, found()))
    worst.add(ScoredImage(2, (100, 100), LABELS[:0], found((0, 0, 5, 5, 0.1, 0))))
    worst.add(ScoredImage(3, (100, 100), LABELS[:1], found()))
    assert [(image.index, image.count) for image in worst.images] == [(1, 3), (0, 2)]


def test_the_worst_images_of_several_processes_are_the_worst_of_all() -> None:
    parts = (WorstImages(), WorstImages())
    for index, labels in enumerate((LABELS[:1], LABELS, LABELS[:2], LABELS[:0])):
        parts[index % 2].add(ScoredImage(index, (100, 100), labels, found()))
    assert [image.index for image in WorstImages.merged(parts).images] == [1, 2, 0]


def test_an_image_is_named_in_coco_by_its_number_if_it_has_one() -> None:
    assert image_ids(["000000397133", "frame_7"]) == [397133, "frame_7"]


def test_two_images_of_one_number_have_two_names_in_coco() -> None:
    assert image_ids(["0001", "1", "01", "2"]) == ["0001", 1, "01", 2]


def test_perfect_detections_score_one_with_pycocotools_and_none_zero(tiny_data: Path) -> None:
    data = Dataset.load(DatasetDescription.from_yaml(tiny_data), "val")
    coco = CocoPredictions(data)
    assert coco.score(300) == (0.0, 0.0)
    for index, (rows, (height, width)) in enumerate(zip(data.labels, data.shapes_hw.tolist(), strict=True)):
        boxes = np.column_stack((rows[:, 1:3] - rows[:, 3:5] / 2, rows[:, 1:3] + rows[:, 3:5] / 2))
        boxes = boxes * [width, height, width, height]
        detections = torch.tensor(np.column_stack((boxes, np.full(len(rows), 0.9), rows[:, 0])))
        coco.add(ScoredImage(index, (height, width), LABELS, detections))
    assert coco.score(300) == pytest.approx((1.0, 1.0), abs=1e-6)
