"""A runs folder of an earlier version goes on: its training resumes, its search is joined, reported and synced.

`tests/old_runs/before-0.2` was written by the version whose package was called `app`: a training stopped in the middle, one
that ended, and a search of three candidates. Images, locks and previous checkpoints are left out.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from starling import settings
from starling.cli import search as search_command
from starling.cli import track, train
from tests.conftest import REPOSITORY

OLD = REPOSITORY / "tests" / "old_runs"
VERSIONS = sorted(path.name for path in OLD.iterdir())


@pytest.fixture(params=VERSIONS)
def old_runs(request: pytest.FixtureRequest, runs: Path) -> Path:
    """Return a copy of the runs folder of one version, as the runs folder."""
    shutil.copytree(OLD / request.param, runs)
    settings.update({"mlflow": False, "tensorboard": False})
    return runs


def rows(path: Path) -> list[dict[str, str]]:
    return [
        {name.strip(): value.strip() for name, value in row.items()} for row in csv.DictReader(path.open())
    ]


def test_a_stopped_training_is_resumed_with_the_same_data_elsewhere(old_runs: Path, tiny_data: Path) -> None:
    run = old_runs / "train" / "cut"
    before = rows(run / "results.csv")
    epochs = len(before) + 1
    words = ["--resume", str(run / "weights/last.pt"), "--data", str(tiny_data), "--epochs", str(epochs)]
    assert train.main(words) == 0
    after = rows(run / "results.csv")
    assert after[: len(before)] == before
    assert len(after) == epochs
    assert (run / ".finished").is_file()


def test_an_ended_training_is_told_to_have_ended(
    old_runs: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = old_runs / "train" / "done" / "weights" / "last.pt"
    assert train.main(["--resume", str(last), "--data", str(tiny_data)]) == 2
    assert "all 2 epochs are done" in capsys.readouterr().err


def test_a_search_is_joined_and_its_budget_adds_up(old_runs: Path, tiny_args: list[str]) -> None:
    words = [*tiny_args, "--noplots", "--project", "blood", "--name", "search", "--evolve", "4"]
    assert train.main(words) == 0
    directory = old_runs / "blood" / "search"
    assert len(rows(directory / "evolve.csv")) == 4
    assert (directory / "report.html").is_file()


def test_a_search_is_shown_and_reported(old_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = old_runs / "blood" / "search"
    assert search_command.main(["show", str(directory), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["finished"]
    assert [candidate["number"] for candidate in shown] == [0, 1, 2]
    assert search_command.main(["report", str(directory)]) == 0
    assert "candidate" in (directory / "report.html").read_text()


def test_what_no_tracker_was_told_is_sent(old_runs: Path) -> None:
    assert track.main(["sync", str(old_runs), "--tracker", "tensorboard"]) == 0
    for run in ("train/cut", "train/done"):
        assert list((old_runs / run).glob("events.out.tfevents.*"))
