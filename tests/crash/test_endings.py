"""A training that is killed after its last epoch is finished by a resume, as one left alone is; a whole one stays so."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from starling import settings
from starling.cli import train
from starling.model.checkpoint import load_checkpoint
from starling.tracking.events import read_events
from tests.crash.conftest import Start

REPLICA = "train-one-cpu0"
STEPS = [int(step) for step in os.environ.get("STARLING_END_STEPS", "1,14,30").split(",")]
"""Writes of the end, of some 40, at which the trainer is killed."""
STILL = "lr0: 0.0\nwarmup_bias_lr: 0.0\nwarmup_epochs: 0.0\nweight_decay: 0.0\n"
"""Hyperparameters under which the fitness never changes."""


@pytest.fixture(autouse=True)
def no_tracking(runs: Path) -> None:
    """Keep the bridge out: it has tests of its own."""
    settings.update({"mlflow": False, "tensorboard": False})


@pytest.fixture
def killed(start: Start, tiny_args: list[str], runs: Path) -> Callable[..., Path]:
    """Return a function that trains `one` and kills it at a step of its end; gives back the run's folder."""

    def kill(step: int, *more: str, epochs: int = 2) -> Path:
        fault = ("die_in_the_end", str(epochs), str(step))
        trainer = start([*tiny_args, "--name", "one", *more], fault)
        assert trainer.wait(180) == -signal.SIGKILL, trainer.output
        return runs / "train" / "one"

    return kill


def files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


def ends(run: Path) -> list[str]:
    """Return how the sessions of a run's log ended."""
    events, _ = read_events(run / "events.jsonl")
    return [event.fields["status"] for event in events if event.name == "run_end"]


def steps_of_metrics(run: Path) -> Counter[int]:
    events, _ = read_events(run / "events.jsonl")
    return Counter(event.fields["step"] for event in events if event.name == "metrics")


def assert_same_results(one: Path, other: Path) -> None:
    """Assert that two runs hold the same files with the same weights and figures."""
    assert files(one) == files(other)
    for name in ("results.csv", "confusion_matrix.json", "results.png", "PR_curve.png", "worst.jpg"):
        if (other / name).exists():
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for name in ("last.pt", "best.pt"):
        ours, theirs = (load_checkpoint(run / "weights" / name) for run in (one, other))
        assert all(torch.equal(ours["ema"][key], theirs["ema"][key]) for key in theirs["ema"]), name
        assert str(ours["rows"]) == str(theirs["rows"])


@pytest.fixture(scope="module")
def whole(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that was left alone."""
    from tests.conftest import TINY_LAYOUT

    runs = tmp_path_factory.mktemp("alone") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STARLING_RUNS", str(runs))
        settings.update({"mlflow": False, "tensorboard": False})
        args = ["--data", str(tiny_data), "--weights", "", "--cfg", str(TINY_LAYOUT), "--img", "64",
                "--batch", "4", "--epochs", "2", "--device", "cpu", "--name", "one", "--save-period", "1"]  # fmt: skip
        assert train.main(args) == 0
    return runs / "train" / "one"


@pytest.mark.parametrize("step", STEPS)
def test_a_training_killed_at_any_step_of_its_end_is_finished_by_a_resume(
    killed: Callable[..., Path], whole: Path, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = killed(step, "--save-period", "1")
    assert train.main(["--resume", str(run), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["epoch"] == load_checkpoint(whole / "weights" / "best.pt")["rows"][-1][0] + 1
    assert_same_results(run, whole)
    assert ends(run).count("finished") == 1
    assert steps_of_metrics(run) == {0: 1, 1: 1}
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert train.main(["--resume", str(run)]) == 2
    assert "all 2 epochs are done; go on with a larger --epochs" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_an_image_of_the_end_that_is_missing_is_drawn_by_a_resume(
    tiny_args: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(tiny_args) == 0
    run = runs / "train" / "exp"
    drawn = files(run)
    for name in ("results.png", "confusion_matrix.png"):
        (run / name).unlink()
    assert train.main(["--resume", str(run)]) == 0
    assert files(run) == drawn
    assert train.main(["--resume", str(run)]) == 2


def test_a_training_that_stopped_by_patience_stays_ended(
    tiny_args: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs.parent / "still.yaml").write_text(STILL)
    args = [*tiny_args, "--hyp", str(runs.parent / "still.yaml"), "--epochs", "30", "--patience", "2"]
    assert train.main([*args, "--noplots"]) == 0
    last = runs / "train" / "exp" / "weights" / "last.pt"
    trained = load_checkpoint(last)["epoch"]
    content = last.read_bytes()
    for _ in range(2):
        assert train.main(["--resume", str(last)]) == 2
        assert "stopped early" in (error := capsys.readouterr().err)
        assert "larger --patience" in error
    assert last.read_bytes() == content
    assert train.main(["--resume", str(last), "--patience", str(trained + 1)]) == 0
    assert load_checkpoint(last)["epoch"] > trained


@pytest.mark.parametrize("step", [2, 20])
def test_a_training_killed_after_it_stopped_by_patience_is_finished_without_another_epoch(
    killed: Callable[..., Path], runs: Path, step: int
) -> None:
    (runs.parent / "still.yaml").write_text(STILL)
    hyp = ["--hyp", str(runs.parent / "still.yaml"), "--epochs", "30", "--patience", "1"]
    run = killed(step, *hyp)
    assert train.main(["--resume", str(run)]) == 0
    assert load_checkpoint(run / "weights" / "last.pt")["epoch"] == 2
    assert (run / "results.png").is_file()
    assert (run / "confusion_matrix.png").is_file()
    assert train.main(["--resume", str(run)]) == 2


def test_a_training_without_saves_that_stops_early_leaves_its_last_checkpoint(
    tiny_args: list[str], runs: Path
) -> None:
    (runs.parent / "still.yaml").write_text(STILL)
    args = [*tiny_args, "--hyp", str(runs.parent / "still.yaml"), "--epochs", "30", "--patience", "1"]
    assert train.main([*args, "--noplots", "--nosave"]) == 0
    assert load_checkpoint(runs / "train" / "exp" / "weights" / "last.pt")["epoch"] == 2
    assert train.main(["--resume"]) == 2


def test_epochs_raised_for_a_run_killed_in_its_end_go_on_training(
    killed: Callable[..., Path], tiny_args: list[str]
) -> None:
    run = killed(14)
    assert train.main(["--resume", str(run), "--epochs", "3"]) == 0
    assert load_checkpoint(run / "weights" / "last.pt")["epoch"] == 3
    assert train.main(["--resume", str(run)]) == 2


def test_epochs_lowered_at_a_resume_end_the_training_with_a_validation(
    tiny_args: list[str], runs: Path, start: Start
) -> None:
    args = [*tiny_args, "--noval", "--epochs", "9", "--name", "one", "--save-minutes", "0"]
    trainer = start(args, ("die_at_iteration", "5"))
    assert trainer.wait() == -signal.SIGKILL
    run = runs / "train" / "one"
    assert train.main(["--resume", str(run), "--epochs", "2"]) == 0
    rows = load_checkpoint(run / "weights" / "last.pt")["rows"]
    assert len(rows) == 2
    assert rows[-1][4] == rows[-1][4], "validated"
    assert (run / "results.png").is_file()


def test_a_replica_finds_whatever_is_left_of_its_own_run(
    tiny_args: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STARLING_REPLICA", REPLICA)
    args = [*tiny_args, "--name", "one", "--epochs", "1", "--noplots", "--noval"]
    assert train.main(args) == 0
    run, status = runs / "train" / "one", runs / ".workers" / f"{REPLICA}.json"
    told = json.loads(status.read_text())
    for lost in ((), (".finished",), (".finished", "summary.json")):  # killed before the last word of each
        status.write_text(json.dumps({**told, "phase": "training"}))
        for name in lost:
            (run / name).unlink()
        assert train.main(args) == 0
        assert [path.name for path in (runs / "train").iterdir()] == ["one"], lost
        assert json.loads(status.read_text())["phase"] == "done"
        assert {".finished", "summary.json"} <= files(run)
    assert ends(run) == ["finished", "finished"], "told again only where the summary was not there"
    assert steps_of_metrics(run) == {0: 1}


@pytest.mark.parametrize("step", [4])
def test_a_replica_killed_in_its_end_finishes_its_own_run_and_begins_no_other(
    killed: Callable[..., Path],
    tiny_args: list[str],
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    run = killed(step)
    [status_file] = (runs / ".workers").glob("*.json")
    status_file.rename(status_file.with_name(f"{REPLICA}.json"))
    monkeypatch.setenv("STARLING_REPLICA", REPLICA)
    assert train.main([*tiny_args, "--name", "one"]) == 0
    assert [path.name for path in (runs / "train").iterdir()] == ["one"]
    assert (run / "results.png").is_file()
    status = json.loads((runs / ".workers" / f"{REPLICA}.json").read_text())
    assert status["phase"] == "done"
    assert ends(run).count("finished") == 1
    assert train.main([*tiny_args, "--name", "one"]) == 0
    assert sorted(path.name for path in (runs / "train").iterdir()) == ["one", "one2"], (
        "a new command, a new run"
    )


def test_the_copy_to_a_bucket_that_a_kill_cut_short_is_made_by_a_resume(
    killed: Callable[..., Path], tmp_path: Path
) -> None:
    bucket = tmp_path / "bucket"
    (tmp_path / "steps").unlink(missing_ok=True)
    run = killed(14, "--bucket", f"file://{bucket}")
    assert train.main(["--resume", str(run)]) == 0
    copied = {path.name for path in bucket.rglob("*") if path.is_file()}
    assert {"results.png", "confusion_matrix.png", "best.pt", "summary.json"} <= copied
