"""Real trainers, killed and stopped at awkward moments, end as if nobody had touched them."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch

from starling.model.checkpoint import load_checkpoint
from starling.model.initial_weights import read_weights
from starling.training.checkpoint import holds_best
from starling.training.reporting.results import EpochRow
from tests.crash.conftest import Start, wait_for


@pytest.fixture
def args(tiny_args: list[str]) -> list[str]:
    """Four iterations an epoch, a step and a save after each."""
    return [*tiny_args, "--noplots", "--batch", "2", "--save-minutes", "0"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_training_killed_at_any_step_and_resumed_ends_with_the_same_weights(
    start: Start, args: list[str], runs: Path
) -> None:
    whole = start([*args, "--epochs", "3", "--name", "whole"])
    assert whole.wait() == 0, whole.output
    killed = start([*args, "--epochs", "3", "--name", "killed"], ("die_at_iteration", "3"))
    assert killed.wait() == -signal.SIGKILL
    last = runs / "train" / "killed" / "weights" / "last.pt"
    assert (load_checkpoint(last)["epoch"], load_checkpoint(last)["iteration"]) == (0, 2)
    for steps in ("1", "4", "2"):  # the same step again; the last of an epoch; the second of one
        killed = start(["--resume", str(last)], ("die_at_iteration", steps))
        assert killed.wait() == -signal.SIGKILL, killed.output
    resumed = start(["--resume", str(last)])
    assert resumed.wait() == 0, resumed.output
    ours, theirs = (
        load_checkpoint(runs / "train" / name / "weights" / "last.pt") for name in ("killed", "whole")
    )
    assert same(ours["model"], theirs["model"])
    assert same(ours["ema"], theirs["ema"])
    csv = [(runs / "train" / name / "results.csv").read_text() for name in ("killed", "whole")]
    assert csv[0] == csv[1]
    best = [read_weights(runs / "train" / name / "weights" / "best.pt").state for name in ("killed", "whole")]
    assert same(best[0], best[1])


def test_kill_between_last_and_best_leaves_both_whole_and_best_is_made_again(
    start: Start, args: list[str], runs: Path
) -> None:
    weights = runs / "train" / "exp" / "weights"
    killed = start([*args, "--epochs", "1"], ("die_before_best", "1"))
    assert killed.wait() == -signal.SIGKILL, killed.output
    state = load_checkpoint(weights / "last.pt")
    rows = [EpochRow.from_list(values) for values in state["rows"]]
    assert state["epoch"] == 1
    assert not holds_best(weights / "best.pt", rows)
    resumed = start(["--resume"])
    assert resumed.wait() == 0, resumed.output
    assert "written anew" in resumed.output
    assert holds_best(weights / "best.pt", rows)
    half = {
        key: value.half().float() if value.is_floating_point() else value
        for key, value in state["ema"].items()
    }
    assert same(read_weights(weights / "best.pt").state, half)
    (weights / "best.pt").unlink()  # and once the run has gone on, its weights are gone: that is said
    assert start(["--resume", "--epochs", "2"], ("die_at_iteration", "4")).wait() == -signal.SIGKILL
    assert load_checkpoint(weights / "last.pt")["iteration"] > 0
    (weights / "best.pt").unlink()
    resumed = start(["--resume"])
    assert resumed.wait() == 0, resumed.output
    assert "the weights of the best epoch (1) are not there" in resumed.output
    assert load_checkpoint(weights / "best.pt")["rows"]


def test_sigterm_in_mid_epoch_ends_the_step_saves_and_exits_143(
    start: Start, tiny_args: list[str], runs: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "began"
    trainer = start([*tiny_args, "--noplots", "--batch", "1"], ("slow_iterations", str(marker)))
    wait_for(marker)
    asked = time.monotonic()
    trainer.send(signal.SIGTERM)
    assert trainer.wait() == 143, trainer.output
    assert time.monotonic() - asked < 10, "docker's grace"
    state = load_checkpoint(runs / "train" / "exp" / "weights" / "last.pt")
    assert state["epoch"] == 0
    assert 0 < state["iteration"] < 8
    assert state["last_step"] == state["iteration"] - 1
    assert "Traceback" not in trainer.output


def test_sigterm_in_a_long_validation_is_heard_at_once_and_the_epoch_is_not_lost(
    start: Start, args: list[str], runs: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "validating"
    trainer = start([*args, "--epochs", "1"], ("slow_validation", str(marker)))
    wait_for(marker)
    asked = time.monotonic()
    trainer.send(signal.SIGTERM)
    assert trainer.wait() == 143, trainer.output
    assert time.monotonic() - asked < 5, "of the ten that it would take"
    last = runs / "train" / "exp" / "weights" / "last.pt"
    assert (load_checkpoint(last)["epoch"], load_checkpoint(last)["iteration"]) == (0, 4)
    resumed = start(["--resume"])
    assert resumed.wait() == 0, resumed.output
    assert load_checkpoint(last)["epoch"] == 1


def test_sigterm_during_a_save_ends_with_that_one_save_and_143(
    start: Start, args: list[str], runs: Path, tmp_path: Path
) -> None:
    trainer = start(args, ("slow_saves", str(tmp_path), "1", "2"))
    wait_for(tmp_path / "began-2")
    trainer.send(signal.SIGTERM)
    assert trainer.wait() == 143, trainer.output
    assert (tmp_path / "done-2").exists()
    assert not (tmp_path / "began-3").exists()
    assert load_checkpoint(runs / "train" / "exp" / "weights" / "last.pt")["iteration"] == 2
    assert not list((runs / "train" / "exp" / "weights").glob(".*"))


def test_sigterm_during_an_epochs_last_save_does_not_save_a_second_time(
    start: Start, tiny_args: list[str], runs: Path, tmp_path: Path
) -> None:
    trainer = start([*tiny_args, "--noplots", "--noval"], ("slow_saves", str(tmp_path), "1"))
    wait_for(tmp_path / "began-1")
    trainer.send(signal.SIGTERM)
    assert trainer.wait() == 143, trainer.output
    assert sorted(path.name for path in tmp_path.glob("*-[0-9]") if "output" not in path.name) == [
        "began-1",
        "done-1",
    ]
    assert load_checkpoint(runs / "train" / "exp" / "weights" / "last.pt")["epoch"] == 1


def test_sigint_saves_and_a_second_one_exits_at_once_with_the_old_checkpoint_valid(
    start: Start, args: list[str], runs: Path, tmp_path: Path
) -> None:
    last = runs / "train" / "exp" / "weights" / "last.pt"
    marker = tmp_path / "began"
    polite = start([*args, "--name", "polite"], ("slow_iterations", str(marker)))
    wait_for(marker)
    polite.send(signal.SIGINT)
    assert polite.wait() == 130, polite.output
    assert load_checkpoint(runs / "train" / "polite" / "weights" / "last.pt")["iteration"] > 0
    hasty = start(args, ("slow_saves", str(tmp_path), "20", "2"))
    wait_for(tmp_path / "began-2")
    hasty.send(signal.SIGINT)
    time.sleep(0.3)
    assert hasty.process.is_alive(), "the first one lets the save finish"
    asked = time.monotonic()
    hasty.send(signal.SIGINT)
    assert hasty.wait() == 130, hasty.output
    assert time.monotonic() - asked < 5
    assert not (tmp_path / "done-2").exists()
    assert load_checkpoint(last)["iteration"] == 1
    resumed = start(["--resume", str(last)])
    assert resumed.wait() == 0, resumed.output
    assert not list(last.parent.glob(".*")), "leftovers are swept"


def test_second_trainer_on_a_run_is_refused_by_the_holders_name_and_a_dead_holder_holds_nothing(
    start: Start, args: list[str], runs: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "began"
    shared = [*args, "--exist-ok", "--epochs", "1"]
    first = start([*shared, "--epochs", "50"], ("slow_iterations", str(marker)))
    wait_for(marker)
    second = start(shared)
    assert second.wait() == 2, second.output
    assert f"already in use by process {first.process.pid} on " in second.output
    assert first.process.is_alive()
    first.send(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    third = start(shared)
    assert third.wait() == 0, third.output
