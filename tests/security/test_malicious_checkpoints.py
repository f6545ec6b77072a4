"""A malicious checkpoint is refused on every path that loads one, and nothing in it ever runs."""

from __future__ import annotations

import pickle
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from starling.cli import train
from starling.core.errors import CheckpointError
from starling.model.checkpoint import load_checkpoint, save_checkpoint
from starling.outputs.run_dir import previous_of
from tests.crash.conftest import Start

Attack = Callable[[Path], None]


def test_the_attacks_work_where_a_file_is_loaded_without_care(
    tmp_path: Path, sentinel: Path, attack: Attack
) -> None:
    path = tmp_path / "evil.pt"
    attack(path)
    content = path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            content = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    elif b"ustar" not in content and not content.startswith(pickle.dumps(0, 4)[:2]):
        torch.load(path, weights_only=False)  # several pickles in a row
    if not sentinel.exists():
        pickle.loads(content)  # noqa: S301
    assert sentinel.exists()


def test_weights_that_would_act_are_exit_4_and_do_not_act(
    tiny_args: list[str], tmp_path: Path, sentinel: Path, attack: Attack, capsys: pytest.CaptureFixture[str]
) -> None:
    attack(tmp_path / "evil.pt")
    assert train.main([*tiny_args, "--weights", str(tmp_path / "evil.pt")]) == 4
    assert "evil.pt" in capsys.readouterr().err
    assert not sentinel.exists()


def test_a_checkpoint_to_resume_that_would_act_is_exit_4_and_does_not_act(
    runs: Path, sentinel: Path, attack: Attack, capsys: pytest.CaptureFixture[str]
) -> None:
    last = runs / "train" / "exp" / "weights" / "last.pt"
    last.parent.mkdir(parents=True)
    attack(last)
    attack(previous_of(last))  # the second choice is looked at with the same care
    for resume in (["--resume"], ["--resume", str(last)], ["--resume", str(runs / "train" / "exp")]):
        assert train.main(resume) == 4
        assert "last.pt" in capsys.readouterr().err
    assert not sentinel.exists()


@pytest.fixture
def search_args(tiny_args: list[str]) -> list[str]:
    return [*tiny_args, "--epochs", "2", "--project", "blood", "--name", "search", "--evolve", "1"]


def test_a_dead_workers_checkpoint_that_would_act_is_not_taken_and_does_not_act(
    start: Start,
    search_args: list[str],
    runs: Path,
    sentinel: Path,
    attack_as_ours: Attack,
    capsys: pytest.CaptureFixture[str],
) -> None:
    killed = start(search_args, ("die_at_iteration", "3"))
    assert killed.wait() == -signal.SIGKILL, killed.output
    last = runs / "blood" / "search" / "candidates" / "0000" / "weights" / "last.pt"
    assert load_checkpoint(last)["epoch"] == 1
    attack_as_ours(last)
    assert train.main(search_args) == 0
    output = capsys.readouterr().out
    assert "takes over" in output
    assert "not taken" in output
    assert "epoch 1/2" in output, "the candidate begins again"
    assert not sentinel.exists()


def test_a_searchs_best_weights_that_would_act_are_replaced_or_exit_4_and_do_not_act(
    search_args: list[str], runs: Path, sentinel: Path, attack_as_ours: Attack
) -> None:
    best = runs / "blood" / "search" / "weights" / "best.pt"
    best.parent.mkdir(parents=True)
    attack_as_ours(best)
    assert train.main(search_args) == 0
    assert load_checkpoint(best)["kind"] == "weights"
    attack_as_ours(best)
    assert train.main(search_args) == 4  # the winner's images cannot be drawn from it
    assert not sentinel.exists()


def test_a_runs_best_weights_that_would_act_do_not_act_on_a_resume(
    start: Start, tiny_args: list[str], runs: Path, sentinel: Path, attack_as_ours: Attack
) -> None:
    assert train.main([*tiny_args, "--noplots", "--epochs", "1"]) == 0
    best = runs / "train" / "exp" / "weights" / "best.pt"
    attack_as_ours(best)
    assert train.main(["--resume", "--epochs", "2"]) == 0
    assert load_checkpoint(best)["kind"] == "weights"
    assert not sentinel.exists()


def test_a_checkpoint_that_grows_when_read_is_refused(
    tiny_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bomb = tmp_path / "weights" / "last.pt"
    bomb.parent.mkdir()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("last/data.pkl", b"starling-1" + bytes(50_000_000))
    assert bomb.stat().st_size < 100_000
    assert train.main([*tiny_args, "--weights", str(bomb)]) == 4
    assert train.main(["--resume", str(bomb)]) == 4
    assert capsys.readouterr().err.count("compressed") == 2


def test_a_checkpoint_whose_entries_claim_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    bomb = tmp_path / "last.pt"
    save_checkpoint(bomb, {"tensor": torch.ones(100)})
    with zipfile.ZipFile(bomb, "a") as archive:
        for entry in archive.infolist():  # the directory alone says so: overlapping entries look like this
            entry.file_size = entry.compress_size = bomb.stat().st_size
        archive.writestr("last/more", b"")
    with pytest.raises(CheckpointError, match="together larger than the file"):
        load_checkpoint(bomb)


def _without(state: dict[str, object], part: str, name: str) -> None:
    del state[part][name]  # type: ignore[attr-defined]


def _reshaped(state: dict[str, object], part: str, name: str) -> None:
    state[part][name] = torch.zeros(1, 2, 3)  # type: ignore[index]


@pytest.mark.parametrize("spoil", [_without, _reshaped])
def test_a_missing_or_misshaped_tensor_is_exit_4_by_name_and_nothing_is_loaded(
    tiny_args: list[str], runs: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[..., None]
) -> None:
    assert train.main([*tiny_args, "--noplots", "--noval", "--epochs", "1"]) == 0
    last, best = (runs / "train" / "exp" / "weights" / name for name in ("last.pt", "best.pt"))
    name = "model.1.conv.weight"
    for path, parts, args in (
        (best, ["ema"], [*tiny_args, "--noplots", "--cfg", "", "--weights", str(best)]),
        (last, ["model"], ["--resume", str(last), "--epochs", "2"]),
        (last, ["ema"], ["--resume", str(last), "--epochs", "2"]),
    ):
        whole = load_checkpoint(path)
        spoiled = load_checkpoint(path)
        for part in parts:
            spoil(spoiled, part, name)
        save_checkpoint(path, spoiled)
        assert train.main(args) == 4
        error = capsys.readouterr().err.strip()
        assert name in error
        assert len(error.splitlines()) == 1
        save_checkpoint(path, whole)
    for entry in ("optimizer", "rows", "config"):
        spoiled = load_checkpoint(last)
        del spoiled[entry]
        save_checkpoint(last, spoiled)
        assert train.main(["--resume", str(last), "--epochs", "2"]) == 4
        assert entry in capsys.readouterr().err
        save_checkpoint(last, {**spoiled, entry: whole[entry]})


def test_fine_tuning_with_other_classes_says_what_it_left_out(
    tiny_args: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*tiny_args, "--noplots", "--noval", "--epochs", "1"]) == 0
    best = runs / "train" / "exp" / "weights" / "best.pt"
    tuned = [
        *tiny_args,
        "--noplots",
        "--noval",
        "--epochs",
        "1",
        "--cfg",
        "",
        "--weights",
        str(best),
        "--single-cls",
    ]
    assert train.main(tuned) == 0
    assert "with another shape: model.10.m.0.weight" in capsys.readouterr().out
