"""A loss that becomes NaN: once, the training goes back and slows down; twice, it stops and keeps what it had."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from starling import settings
from starling.cli import train
from starling.core.worker_status import FOLDER
from starling.data.loader.loader import Batch
from starling.model import head
from starling.model.checkpoint import load_checkpoint
from starling.model.detector import Detector
from starling.model.loss import DetectionLoss
from starling.training import checkpoint as saving
from starling.training import trainer
from starling.training.learner import LossWatch, is_finite, split


@pytest.fixture(autouse=True)
def no_tracking(runs: Path) -> None:
    """Keep the bridge out: it has tests of its own."""
    settings.update({"mlflow": False, "tensorboard": False})


def poison(monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """Make the loss NaN in the given training calls, counted from 1."""
    count = 0

    class Poisoned(DetectionLoss):
        def forward(self, *given: Any) -> tuple[Tensor, Tensor]:
            nonlocal count
            total, parts = super().forward(*given)
            if not total.requires_grad:  # validation
                return total, parts
            count += 1
            return (total * math.nan, parts * math.nan) if count in calls else (total, parts)

    monkeypatch.setattr(head, "DetectionLoss", Poisoned)


def rates(run: Path) -> list[float]:
    with open(run / "results.csv") as file:
        return [float(row["x/lr0"]) for row in csv.DictReader(file)]


def test_a_nan_loss_goes_back_to_the_last_epoch_at_a_tenth_of_the_rate(
    tiny_args: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, 4)  # the second iteration of the second epoch
    assert train.main([*tiny_args, "--noplots", "--epochs", "3"]) == 0
    said = capsys.readouterr().out
    assert "epoch 2, iteration 3: the loss is no longer a number; going on from epoch 2, iteration 2" in said
    run = runs / "train" / "exp"
    assert len(rates(run)) == 3
    assert rates(run)[1] < 0.11 * rates(run)[0]
    assert load_checkpoint(run / "weights" / "last.pt")["rate_scale"] == pytest.approx(0.1)


def test_a_nan_in_the_first_epoch_goes_back_to_the_beginning(
    tiny_args: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 1)
    assert train.main([*tiny_args, "--noplots"]) == 0
    state = load_checkpoint(runs / "train" / "exp" / "weights" / "last.pt")
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_a_nan_never_goes_back_to_the_checkpoint_of_an_earlier_run_in_the_folder(
    tiny_args: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = [*tiny_args, "--noplots", "--noval", "--exist-ok"]
    assert train.main([*quick, "--epochs", "1"]) == 0
    poison(monkeypatch, 1)
    assert train.main(quick) == 0
    assert "iteration 0: the loss is no longer a number; going on from epoch 1, iteration 0" in (
        capsys.readouterr().out
    )


def test_weights_that_are_no_numbers_are_never_saved(
    tiny_args: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, sound = saving.save_checkpoint, []

    def save(path: Path, state: dict[str, Any], **options: Any) -> None:
        sound.append(all(torch.isfinite(value).all() for value in state["ema"].values()))
        whole(path, state, **options)

    monkeypatch.setattr(saving, "save_checkpoint", save)
    poison(monkeypatch, 2)
    often = ["--noplots", "--noval", "--batch", "2", "--save-minutes", "0"]
    assert train.main([*tiny_args, *often]) == 0
    assert len(sound) > 4
    assert all(sound)


def test_a_second_nan_stops_with_its_iteration_and_leaves_the_best_alone(
    tiny_args: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, 4, 6)  # both iterations of the second epoch's second try are behind the first NaN
    assert train.main([*tiny_args, "--noplots", "--epochs", "3"]) == 1
    error = capsys.readouterr().err
    assert "iteration 3" in error
    assert "lower lr0 (now 0.001)" in error
    weights = runs / "train" / "exp" / "weights"
    for name in ("best.pt", "last.pt"):
        assert load_checkpoint(weights / name)["rows"][-1][0] == 0
    [status] = (runs / FOLDER).glob("*.json")
    assert json.loads(status.read_text())["lasting"] is True, "its supervisor does not try it again"


def test_a_resume_keeps_the_lowered_rate_and_knows_that_the_second_chance_is_gone(
    tiny_args: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, 4, 7)  # the second is the resume's first: six are before it
    assert train.main([*tiny_args, "--noplots", "--noval"]) == 0
    last = runs / "train" / "exp" / "weights" / "last.pt"
    assert train.main(["--resume", str(last), "--epochs", "4"]) == 1
    assert "lower lr0 (now 0.001)" in capsys.readouterr().err


def test_a_weight_that_is_no_number_goes_back_though_every_loss_was_one(
    tiny_args: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, count = trainer.Trainer._iterate, 0

    def iterate(self: trainer.Trainer, batch: Batch, position: int) -> None:
        nonlocal count
        whole(self, batch, position)
        count += 1
        if count == 4:  # the last iteration of the second epoch: no loss sees it
            with torch.no_grad():
                next(self.model.parameters())[0, 0, 0, 0] = float("inf")

    monkeypatch.setattr(trainer.Trainer, "_iterate", iterate)
    assert train.main([*tiny_args, "--noplots", "--noval"]) == 0
    assert "epoch 2, iteration 3: the loss is no longer a number" in capsys.readouterr().out
    state = load_checkpoint(runs / "train" / "exp" / "weights" / "last.pt")
    assert state["rollbacks_left"] == 0
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def limit_memory(monkeypatch: pytest.MonkeyPatch, images: int) -> None:
    """Let training on more images at once fail as torch does on the CPU."""
    forward = Detector.forward

    def limited(self: Detector, batch: Tensor) -> object:
        if self.training and len(batch) > images:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return forward(self, batch)

    monkeypatch.setattr(Detector, "forward", limited)


def test_a_batch_that_does_not_fit_goes_through_in_parts_and_a_resume_keeps_them(
    tiny_args: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limit_memory(monkeypatch, 1)
    assert train.main([*tiny_args, "--noplots"]) == 0
    said = capsys.readouterr().out
    assert "from here a batch goes through in 2 parts" in said
    assert "from here a batch goes through in 4 parts" in said
    last = runs / "train" / "exp" / "weights" / "last.pt"
    assert load_checkpoint(last)["parts"] == 4
    assert train.main(["--resume", str(last), "--epochs", "3"]) == 0
    assert "goes through in" not in capsys.readouterr().out


def test_a_step_in_which_memory_runs_out_gathers_its_nominal_batch_anew(
    tiny_args: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Batches of 4, so 16 to a step, and two an epoch: the first step is due after iteration 15.
    forward, calls = Detector.forward, []

    def short_once(self: Detector, batch: Tensor) -> object:
        calls.append(self.training)
        if self.training and sum(calls) == 6:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return forward(self, batch)

    monkeypatch.setattr(Detector, "forward", short_once)
    hyp = runs.parent / "still.yaml"
    hyp.write_text("warmup_epochs: 0.0\n")
    assert train.main([*tiny_args, "--noplots", "--noval", "--hyp", str(hyp), "--epochs", "12"]) == 0
    assert load_checkpoint(runs / "train" / "exp" / "weights" / "last.pt")["last_step"] == 4 + 16


def test_one_image_that_does_not_fit_is_an_error_with_the_remedy(
    tiny_args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limit_memory(monkeypatch, 0)
    assert train.main([*tiny_args, "--noplots"]) == 1
    assert "lower --batch or --imgsz" in capsys.readouterr().err


def test_parts_hold_the_whole_batch_and_number_their_targets_anew() -> None:
    targets = torch.tensor(
        [[0, 1, 0.1, 0.1, 0.1, 0.1], [2, 0, 0.2, 0.2, 0.2, 0.2], [4, 2, 0.3, 0.3, 0.3, 0.3]]
    )
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1)
    batch = Batch(
        images=images,
        targets=targets,
        indices=(5, 6, 7, 8, 9),
        geometry=None,
        original_hw=((1, 1),) * 5,
        whole=5,
    )
    parts = list(split(batch, 2))
    assert [part.indices for part in parts] == [(5, 6, 7), (8, 9)]
    assert torch.equal(torch.cat([part.images for part in parts]), images)
    assert [part.targets[:, 0].tolist() for part in parts] == [[0, 2], [1]]
    assert torch.equal(batch.targets, targets), "the batch itself is left alone"


def test_the_watch_remembers_the_first_bad_iteration_only() -> None:
    watch = LossWatch(torch.device("cpu"))
    for position, loss in enumerate([1.0, float("inf"), float("nan"), 1.0]):
        watch.look(torch.tensor(loss), position)
    assert watch.first_bad() == 1
    watch.reset()
    assert watch.first_bad() is None


def test_one_infinite_weight_is_noticed() -> None:
    model = nn.Linear(3, 3)
    assert is_finite(model)
    with torch.no_grad():
        model.weight[1, 2] = float("inf")
    assert not is_finite(model)
