"""A single training that its replica starts again goes on with its own run, and with no other."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from starling.cli import train
from starling.core.settings.train import parse_args
from starling.model.checkpoint import load_checkpoint
from starling.training.resume.own_run import go_on
from starling.training.training import read_hyp
from tests.crash.conftest import Start

REPLICA = "train-one-cpu0"


@pytest.fixture
def args(tiny_args: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a training of two iterations an epoch, with a save after each, and without trackers."""
    from starling import settings

    settings.update({"mlflow": False})
    return [*tiny_args, "--noplots", "--save-minutes", "0", "--name", "one"]


def as_replica(runs: Path) -> Path:
    """Give the one worker's status the replica's name, as if the launcher had started it; return the file."""
    [status] = (runs / ".workers").glob("*.json")
    return status.rename(status.with_name(f"{REPLICA}.json"))


def names(runs: Path) -> list[str]:
    return sorted(path.name for path in (runs / "train").iterdir())


@pytest.fixture
def killed(start: Start, args: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a run that was killed in its second epoch; this process is its replica from now on."""
    assert start(args, ("die_at_iteration", "3")).wait() == -signal.SIGKILL
    as_replica(runs)
    monkeypatch.setenv("STARLING_REPLICA", REPLICA)
    return runs / "train" / "one"


def test_a_killed_training_goes_on_by_itself_and_ends_like_one_left_alone(
    killed: Path, args: list[str], runs: Path, capsys: pytest.CaptureFixture[str], said: list[str]
) -> None:
    assert train.main(args) == 0
    assert "resuming" in capsys.readouterr().out
    assert names(runs) == ["one"]
    assert train.main([*args, "--name", "whole"]) == 0
    ours, theirs = (load_checkpoint(runs / "train" / name / "weights/last.pt") for name in ("one", "whole"))
    assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in ours["model"])
    assert go_on(parse_args([*args, "--name", "whole"]), read_hyp).config.resume == "", "it is done"


def test_only_the_same_command_by_the_same_replica_goes_on(
    killed: Path, args: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:

    def resumed(*more: str) -> str:
        return go_on(parse_args([*args, *more]), read_hyp).config.resume

    assert resumed() == str(killed / "weights/last.pt")
    assert resumed("--epochs", "5", "--workers", "1") == resumed(), "a resume may change these"
    others = (("--seed", "1"), ("--optimizer", "Adam"), ("--name", "two"), ("--project", "other"))
    assert [resumed(*other) for other in others] == [""] * len(others)
    edited = go_on(parse_args(args), lambda config: replace(read_hyp(config), lr0=0.5))
    assert edited.config.resume == "", "the same --hyp file, with another learning rate in it by now"
    status = runs / ".workers" / f"{REPLICA}.json"
    told = status.read_text()
    for ended in ("done", "failed"):
        status.write_text(json.dumps({**json.loads(told), "phase": ended}))
        assert bool(resumed()) == (ended != "done")
    monkeypatch.setenv("STARLING_REPLICA", "another")
    assert resumed() == ""
    monkeypatch.delenv("STARLING_REPLICA")
    assert resumed() == "", "only the launcher's replicas"
    assert said == []


def test_a_damaged_run_is_left_as_it_is_and_said(killed: Path, args: list[str], said: list[str]) -> None:
    damaged = {path: path.read_bytes()[:1000] for path in killed.glob("weights/last*.pt")}
    for path, content in damaged.items():
        path.write_bytes(content)
    assert go_on(parse_args(args), read_hyp).config.resume == ""
    assert len(said) == 1
    assert said[0].endswith("starting anew")
    assert {path: path.read_bytes() for path in damaged} == damaged


@pytest.fixture
def empty(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a run that was killed before its first checkpoint."""
    folder = runs / "train" / "one2"
    (folder / "weights").mkdir(parents=True)
    (runs / ".workers").mkdir()
    (runs / ".workers" / f"{REPLICA}.json").write_text(json.dumps({"run_dir": str(folder)}))
    monkeypatch.setenv("STARLING_REPLICA", REPLICA)
    return folder


def test_a_run_killed_before_its_first_checkpoint_begins_again_in_its_folder(
    empty: Path, args: list[str]
) -> None:
    config = go_on(parse_args(args), read_hyp).config
    assert (config.name, config.exist_ok, config.resume) == ("one2", True, "")
    (empty / "weights" / "best.pt").write_bytes(b"something to lose")
    assert go_on(parse_args(args), read_hyp).config.name == "one"


def test_a_forged_status_leads_nowhere(empty: Path, args: list[str], runs: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "one"
    elsewhere.mkdir(parents=True)
    link = runs / "train" / "one3"
    link.symlink_to(elsewhere)
    command = parse_args(args)
    for forged in (str(elsewhere), str(link), "/etc", "one", f"{empty}/../../../elsewhere/one"):
        (runs / ".workers" / f"{REPLICA}.json").write_text(json.dumps({"run_dir": forged}))
        assert go_on(command, read_hyp) is command, forged
