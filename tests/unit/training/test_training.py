"""A training from its command line to its files, small and real."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from starling.cli import train
from starling.data.loader.loader import TrainLoader
from starling.device import Compute
from starling.model.checkpoint import load_checkpoint, save_checkpoint
from tests.conftest import PYTHON_PATH, REPOSITORY, TINY_LAYOUT

IMAGES = [
    "labels.jpg", "labels_correlogram.jpg", "train_batch0.jpg", "val_batch0_labels.jpg", "val_batch0_pred.jpg",
    "results.png", "confusion_matrix.png", "PR_curve.png", "F1_curve.png", "P_curve.png", "R_curve.png",
    "worst.jpg",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_tracking(runs: Path) -> None:
    """Keep the bridge out: it has tests of its own, and importing MLflow takes seconds."""
    from starling import settings

    settings.update({"mlflow": False, "tensorboard": False})


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "results.csv") as file:
        return list(csv.DictReader(file))


def test_training_writes_the_classic_files(tiny_args: list[str], runs: Path) -> None:
    assert train.main(tiny_args) == 0
    run = runs / "train" / "exp"
    missing = [name for name in [*IMAGES, "hyp.yaml", "opt.yaml", "weights/last.pt", "weights/best.pt"]
               if not (run / name).is_file()]  # fmt: skip
    assert not missing
    assert [row["epoch"] for row in rows(run)] == ["0", "1"]
    assert float(rows(run)[1]["train/box_loss"]) > 0


def test_json_is_the_last_line_and_names_the_figures(
    tiny_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*tiny_args, "--noplots", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"precision", "recall", "mAP50", "mAP50_95"} <= figures.keys()
    assert figures["left_out"] == {"train": [], "val": []}
    assert Path(figures["weights"]).is_file()


def test_automatic_batch_on_the_cpu_is_sixteen_and_said(
    tiny_args: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*tiny_args, "--noplots", "--epochs", "1", "--batch", "-1"]) == 0
    assert "the batch is 16" in capsys.readouterr().out
    assert "batch_size: 16" in (runs / "train" / "exp" / "opt.yaml").read_text()


def test_a_second_training_gets_a_folder_of_its_own(tiny_args: list[str], runs: Path) -> None:
    for _ in range(2):
        assert train.main([*tiny_args, "--epochs", "1", "--noplots"]) == 0
    assert (runs / "train" / "exp2" / "results.csv").is_file()


def test_project_and_name_land_below_the_runs_folder(tiny_args: list[str], runs: Path) -> None:
    assert (
        train.main([*tiny_args, "--epochs", "1", "--noplots", "--project", "blood", "--name", "first"]) == 0
    )
    assert (runs / "blood" / "first" / "weights" / "best.pt").is_file()


def test_a_project_that_climbs_out_of_the_runs_folder_is_refused(
    tiny_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*tiny_args, "--project", "../../etc"]) == 2
    assert "leaves the runs folder" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["tiny.yaml", "tiny-u.yaml"])
def test_resumed_training_ends_with_the_same_weights_as_one_left_alone(
    tiny_args: list[str], runs: Path, layout: str
) -> None:
    common = [*tiny_args, "--noplots", "--batch", "3", "--cfg", str(TINY_LAYOUT.with_name(layout))]
    assert train.main([*common, "--epochs", "12", "--name", "whole"]) == 0
    _interrupt_after(common, runs, epochs=2)
    assert train.main(["--resume", str(runs / "train" / "stopped" / "weights" / "last.pt")]) == 0
    whole, resumed = (
        load_checkpoint(runs / "train" / name / "weights" / "last.pt") for name in ("whole", "stopped")
    )
    for part in ("model", "ema"):
        assert all(torch.equal(whole[part][key], resumed[part][key]) for key in whole[part])
    assert (runs / "train" / "whole" / "results.csv").read_text() == (
        runs / "train" / "stopped" / "results.csv"
    ).read_text()


def _interrupt_after(common: list[str], runs: Path, epochs: int) -> None:
    """Train a run named `stopped` and stop it by SIGTERM once so many epochs are done."""
    command = [sys.executable, "app/train.py", *common, "--epochs", "12", "--name", "stopped"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(f"epoch {epochs}/12"):
            process.send_signal(signal.SIGTERM)
            break
    process.stdout.read()
    assert process.wait(60) == 143
    assert len(rows(runs / "train" / "stopped")) < 12


def test_sigterm_in_mid_epoch_saves_a_checkpoint_and_exits_143(tiny_args: list[str], runs: Path) -> None:
    command = [sys.executable, "app/train.py", *tiny_args, "--epochs", "1000", "--noplots", "--noval"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    last = runs / "train" / "exp" / "weights" / "last.pt"
    deadline = time.monotonic() + 60
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 143, output
    assert "Traceback" not in output
    assert load_checkpoint(last)["epoch"] >= 1


def test_a_resume_with_other_classes_than_the_checkpoints_is_exit_4(
    tiny_args: list[str], tiny_data: Path, tmp_path: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    description = tmp_path / "data.yaml"
    described = "path: {0}\ntrain: images/train\nval: images/val\nnames: [{1}]\n"
    description.write_text(described.format(tiny_data.parent, "RBC, WBC, Platelets"))
    quick = [*tiny_args, "--data", str(description), "--noplots", "--noval"]
    assert train.main([*quick, "--epochs", "1"]) == 0
    description.write_text(described.format(tiny_data.parent, "RBC, Platelets, WBC"))
    assert train.main(["--resume", str(runs / "train" / "exp"), "--epochs", "2"]) == 4
    error = capsys.readouterr().err
    assert "the classes RBC, WBC, Platelets, the dataset has RBC, Platelets, WBC" in error


def test_a_resume_draws_images_by_the_class_maps_of_the_last_validation(
    tiny_args: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train.main([*tiny_args, "--noplots", "--image-weights", "--epochs", "1"]) == 0
    last = runs / "train" / "exp" / "weights" / "last.pt"
    maps = [0.9, 0.1, 0.5]  # this detector's own are all 0
    save_checkpoint(last, {**load_checkpoint(last), "class_maps": maps})
    whole, seen = TrainLoader.epoch, []

    def epoch(self: TrainLoader, *args: Any, **options: Any) -> Any:
        seen.append(self.class_maps)
        return whole(self, *args, **options)

    monkeypatch.setattr(TrainLoader, "epoch", epoch)
    assert train.main(["--resume", str(last), "--epochs", "2"]) == 0
    assert seen == [maps]


def test_resume_of_a_finished_run_says_to_raise_the_epochs(
    tiny_args: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*tiny_args, "--noplots"]) == 0
    assert train.main(["--resume"]) == 2
    assert "larger --epochs" in capsys.readouterr().err
    assert train.main(["--resume", "--epochs", "3"]) == 0
    assert len(rows(runs / "train" / "exp")) == 3


def test_weights_that_are_no_runs_last_are_not_resumed(
    tiny_args: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*tiny_args, "--noplots"]) == 0
    best = runs / "train" / "exp" / "weights" / "best.pt"
    assert train.main(["--resume", str(best)]) == 4
    assert f"--weights {best}" in capsys.readouterr().err


def test_resume_needs_neither_the_weights_nor_the_layout_it_began_with(
    tiny_args: list[str], runs: Path
) -> None:
    layout = runs.parent / "mine.yaml"
    layout.write_text(TINY_LAYOUT.read_text())
    assert train.main([*tiny_args, "--cfg", str(layout), "--noplots", "--epochs", "1"]) == 0
    layout.unlink()
    assert train.main(["--resume", str(runs / "train" / "exp"), "--epochs", "2"]) == 0


def test_resume_refuses_a_flag_that_would_change_the_training(
    tiny_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*tiny_args, "--noplots"]) == 0
    assert train.main(["--resume", "--batch", "2", "--epochs", "3"]) == 2
    assert "--batch-size" in capsys.readouterr().err


def test_fine_tuning_takes_weights_and_their_layout(tiny_args: list[str], runs: Path) -> None:
    assert train.main([*tiny_args, "--noplots"]) == 0
    best = runs / "train" / "exp" / "weights" / "best.pt"
    tuned = [*tiny_args, "--noplots", "--epochs", "1", "--weights", str(best), "--cfg", ""]
    assert train.main(tuned) == 0


def test_single_class_training_renames_every_label(tiny_args: list[str], runs: Path) -> None:
    assert train.main([*tiny_args, "--noplots", "--single-cls", "--epochs", "1"]) == 0
    assert len(load_checkpoint(runs / "train" / "exp" / "weights" / "last.pt")["names"]) == 1


def test_early_stop_ends_a_training_that_no_longer_improves(
    tiny_args: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A rate of nothing: the fitness never improves after the first epoch.
    hyp = runs.parent / "still.yaml"
    hyp.write_text("lr0: 0.0\nwarmup_bias_lr: 0.0\nwarmup_epochs: 0.0\nweight_decay: 0.0\n")
    args = [*tiny_args, "--noplots", "--hyp", str(hyp), "--epochs", "30", "--patience", "2"]
    assert train.main(args) == 0
    assert "stopped early" in capsys.readouterr().out
    assert len(rows(runs / "train" / "exp")) < 30


@pytest.mark.parametrize(
    ("changed", "code", "words"),
    [
        (["--data", "nowhere.yaml"], 3, "no such file"),
        (["--cfg", "yolov5q.yaml"], 2, "did you mean"),
        (["--weights", "missing.pt"], 4, "no such file"),
        (["--hyp", "hyp.scratch.yaml"], 2, "hyp.scratch-low.yaml"),
        (["--device", "7"], 2, "--device cpu"),
        (["--device", "tpu"], 2, "not a device"),
        (["--epochs", "0"], 2, "at least 1"),
        (["--batch", "0"], 2, "at least 1"),
        (["--name", "../x"], 2, "one folder name"),
        (["--resume", "missing.pt"], 4, "no such checkpoint"),
        (["--sync-bn", "--device", "cpu"], 2, "between GPUs only"),
        (["--quad", "--batch", "6"], 2, "multiple of 4"),
        (["--epoochs", "3"], 2, "did you mean '--epochs'"),
        (["--optimizer", "LBFGS"], 2, "invalid choice"),
    ],
)
def test_bad_input_gets_one_message_and_leaves_nothing(
    tiny_args: list[str],
    runs: Path,
    capsys: pytest.CaptureFixture[str],
    changed: list[str],
    code: int,
    words: str,
) -> None:
    args = tiny_args if "--device" not in changed else tiny_args[:-2]
    assert train.main([*args, *changed]) == code
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not list(runs.rglob("results.csv"))
    assert not (runs / "train").exists()


def test_help_does_not_import_torch() -> None:
    code = "import sys; sys.argv = ['train.py', '--help']\nfrom app import train\ntry: train.main()\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules or 'cv2' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": PYTHON_PATH}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode == 0


@pytest.mark.parametrize("cache", ["auto", "device"])
def test_a_training_whose_images_lie_on_the_device_is_augmented_there(
    tiny_args: list[str],
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cache: str,
) -> None:
    # A GPU's memory is made up; the painter, its images and the training are real, on the CPU.
    assert train.main([*tiny_args, "--noplots", "--name", "plain"]) == 0
    monkeypatch.setattr(Compute, "image_bytes", lambda self, share: int(share * 2**30))
    assert train.main([*tiny_args, "--name", "device", "--cache", cache]) == 0
    assert "augmentation on the GPU, painted by torch" in capsys.readouterr().out
    assert (runs / "train" / "device" / "train_batch0.jpg").is_file()
    plain, device = (
        load_checkpoint(runs / "train" / name / "weights" / "last.pt")["rows"][0]
        for name in ("plain", "device")
    )
    assert plain[1:4] != device[1:4], "the same kernels painted both"
    losses = [*range(1, 4), *range(8, 11)]  # of training and of validation
    assert [plain[at] for at in losses] == pytest.approx([device[at] for at in losses], rel=0.01)
