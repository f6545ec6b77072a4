"""Why a replica's trainer has failed, left where `launcher status` looks: also before there is a run that tells it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from starling.cli import train
from starling.core.worker_status import WorkerStatus, tell_failure, unfinished_run


@pytest.fixture
def status(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the replica that this process is."""
    monkeypatch.setenv("STARLING_REPLICA", "r")
    return runs / ".workers" / "r.json"


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["--epohs", "3"], 2, "unrecognized arguments: --epohs 3"),
        (["--batch", "0"], 2, "must be at least 1"),
        (["--weights", "", "--cfg", "gone.yaml"], 2, "--cfg gone.yaml: no such file"),
        (
            ["--data", "gone.yaml", "--weights", "", "--cfg", "yolov5n.yaml"],
            3,
            "--data gone.yaml: no such file",
        ),
        (["--weights", "gone.pt"], 4, "--weights gone.pt: no such file"),
    ],
)
def test_a_mistake_is_told_with_its_reason(words: list[str], code: int, reason: str, status: Path) -> None:
    assert train.main([*words, "--device", "cpu"]) == code
    told = json.loads(status.read_text())
    assert told["phase"] == "failed"
    assert reason in told["message"]


def test_a_trainer_outside_the_launcher_tells_nobody(runs: Path) -> None:
    assert train.main(["--epohs", "3"]) == 2
    assert not runs.exists()


def test_of_processes_that_train_together_one_tells(status: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert train.main(["--epohs", "3"]) == 2
    assert not status.exists()


def test_what_the_run_told_of_its_own_end_stays(status: Path) -> None:
    WorkerStatus(status.parents[1], "r").update(phase="failed", message="the loss is no number", epoch=7)
    before = status.read_text()
    tell_failure(status.parents[1], "r", "something else")
    assert status.read_text() == before


def test_the_run_of_an_earlier_try_is_still_known(status: Path) -> None:
    status.parent.mkdir(parents=True)
    earlier = {"pid": os.getpid() + 1, "phase": "failed", "message": "crashed", "run_dir": "/runs/train/exp"}
    status.write_text(json.dumps(earlier))
    assert train.main(["--epohs", "3"]) == 2
    assert "unrecognized" in json.loads(status.read_text())["message"]
    assert unfinished_run(status) == "/runs/train/exp"
