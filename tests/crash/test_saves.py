"""A checkpoint is whole whatever hits the one who saves it: kills, full disks, failing disks."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from starling import settings
from starling.cli import train
from starling.core.errors import DiskFull
from starling.core.files.atomic import sweep
from starling.model.checkpoint import load_checkpoint, load_newest, save_checkpoint
from starling.outputs.run_dir import previous_of
from starling.search.storage.journal import SafeJournalBackend
from tests.crash.conftest import Start, Strace
from tests.crash.under_strace import NEW, OLD, RECORD


def test_kill_at_any_system_call_of_a_save_leaves_the_old_or_the_new_checkpoint(
    strace: Strace, tmp_path: Path
) -> None:
    ends = strace("save", ["write", "fsync", "rename", "link", "unlink"], "signal=SIGKILL")
    assert all(ways[-1] == "done" and set(ways[:-1]) == {"killed"} for ways in ends.values()), ends
    assert {call: len(ways) > 1 for call, ways in ends.items()} == dict.fromkeys(ends, True)
    assert len(ends["rename"]) == 3, "one kill before each of the two renames"
    seen = set()
    for call, ways in ends.items():
        for place in range(len(ways)):
            case = tmp_path / "cases" / f"{call}-{place}"
            last = load_checkpoint(case / "last.pt")["value"]
            previous = load_checkpoint(previous_of(case / "last.pt"))["value"]
            assert (last, previous) in {(OLD, OLD - 1), (OLD, OLD), (NEW, OLD)}
            seen.add((last, previous))
            sweep(case)
            save_checkpoint(case / "last.pt", {"value": NEW + 1}, previous=previous_of(case / "last.pt"))
            assert sorted(path.name for path in case.iterdir()) == ["last.previous.pt", "last.pt"]
    assert len(seen) == 3


def test_failed_fsync_is_never_reported_as_saved(strace: Strace, tmp_path: Path) -> None:
    ends = strace("save", ["fsync"], "error=EIO")
    # The file's own, before the rename; then the folder's, after it: the new one is there and yet not promised.
    assert ends["fsync"] == ["refused", "refused", "done"]
    assert load_checkpoint(tmp_path / "cases" / "fsync-0" / "last.pt")["value"] == OLD
    assert load_checkpoint(tmp_path / "cases" / "fsync-1" / "last.pt")["value"] == NEW
    assert not list((tmp_path / "cases" / "fsync-0").glob(".*.part"))


def test_kill_at_any_system_call_of_a_study_append_keeps_whole_records(
    strace: Strace, tmp_path: Path
) -> None:
    ends = strace("append", ["flock", "pread", "truncate", "statfs", "pwrite", "fsync"], "signal=SIGKILL")
    assert all(ways[-1] == "done" and set(ways[:-1]) == {"killed"} for ways in ends.values()), ends
    for call, ways in ends.items():
        for place in range(len(ways)):
            journal = tmp_path / "cases" / f"{call}-{place}" / "journal"
            survived = list(SafeJournalBackend(journal).read_logs(0))
            assert len(survived) in (1, 3)
            SafeJournalBackend(journal).append_logs([RECORD])
            *before, last = SafeJournalBackend(journal).read_logs(0)
            assert before == survived
            assert {key: value for key, value in last.items() if key != "crc"} == RECORD


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "starling-test", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a file system needs root and the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_keeps_the_old_checkpoint_whole_and_names_the_path(small_disk: Path) -> None:
    path = small_disk / "last.pt"
    save_checkpoint(path, {"value": OLD, "tensor": torch.ones(10_000)})
    for elements in (60_000, 500_000):  # too much beside the old one; more than there is at all
        with pytest.raises(DiskFull, match=r"last\.pt.*No space left") as caught:
            save_checkpoint(path, {"value": NEW, "tensor": torch.ones(elements)}, previous=previous_of(path))
        assert caught.value.exit_code == 6
        assert load_checkpoint(path)["value"] == OLD
        assert not list(small_disk.glob(".*"))


@pytest.fixture(autouse=True)
def no_tracking(runs: Path) -> None:
    """Keep the bridge out: it has tests of its own, and importing MLflow takes seconds."""
    settings.update({"mlflow": False, "tensorboard": False})


@pytest.mark.parametrize(
    ("fault", "words"),
    [(("full_disk", "100000"), "File too large"), (("failing_disk",), "Input/output error")],
)
def test_training_on_a_disk_that_refuses_ends_with_exit_6_and_one_message(
    start: Start, tiny_args: list[str], runs: Path, fault: tuple[str, ...], words: str
) -> None:
    trainer = start([*tiny_args, "--noplots", "--noval", "--epochs", "1"], fault)
    assert trainer.wait() == 6, trainer.output
    message = trainer.output.splitlines()[-1]
    assert message.startswith("error: ")
    assert str(runs / "train" / "exp" / "weights" / "last.pt") in message
    assert words in message
    assert "Traceback" not in trainer.output
    assert not list((runs / "train" / "exp" / "weights").iterdir())


def test_checkpoint_damaged_in_any_kib_is_refused_and_the_one_before_taken(
    tmp_path: Path, said: list[str]
) -> None:
    last = tmp_path / "weights" / "last.pt"
    for value in (OLD, NEW):
        save_checkpoint(last, {"value": value, "tensor": torch.randn(4000)}, previous=previous_of(last))
    whole, generator, refused = last.read_bytes(), random.Random(0), 0
    for position in range(0, len(whole), 1024):
        flipped = bytearray(whole)
        flipped[min(position + generator.randrange(1024), len(whole) - 1)] ^= 1 << generator.randrange(8)
        for damaged in (whole[:position], bytes(flipped)):
            last.write_bytes(damaged)
            said.clear()
            state, taken = load_newest(last)
            assert (state["value"], taken) in {(OLD, previous_of(last)), (NEW, last)}
            assert bool(said) == (taken != last)
            assert len(damaged) == len(whole) or taken != last, "a truncated file was taken for whole"
            refused += taken != last
    # A flip in the archive's padding or dates changes nothing that is read.
    assert refused > 1.5 * (len(whole) // 1024)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_resume_goes_on_from_the_checkpoint_before_a_damaged_one_and_says_so(
    tiny_args: list[str], runs: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    assert train.main([*tiny_args, "--noplots", "--noval", "--save-minutes", "0"]) == 0
    weights = runs / "train" / "exp" / "weights"
    before = load_checkpoint(weights / "last.previous.pt")
    assert (before["epoch"], before["iteration"]) == (1, 2)
    whole = load_checkpoint(weights / "last.pt")
    os.truncate(weights / "last.pt", 1000) if damage == "cut" else (weights / "last.pt").unlink()
    assert train.main(["--resume"]) == 0
    assert "last.previous.pt" in capsys.readouterr().out
    resumed = load_checkpoint(weights / "last.pt")
    assert all(torch.equal(whole["model"][key], resumed["model"][key]) for key in whole["model"])
    # The damaged one never takes the place of the one that was whole.
    assert load_checkpoint(weights / "last.previous.pt")["iteration"] == 2


def test_leftovers_of_a_killed_save_are_swept_by_the_next_training(tiny_args: list[str], runs: Path) -> None:
    leftover = runs / "train" / "exp" / "weights" / ".last.pt.0123456789abcdef.part"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    assert train.main([*tiny_args, "--noplots", "--noval", "--epochs", "1", "--exist-ok"]) == 0
    assert not leftover.exists()


def test_a_new_training_in_an_old_folder_never_falls_back_to_the_old_ones_checkpoint(
    tiny_args: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = [*tiny_args, "--noplots", "--noval", "--exist-ok"]
    last = runs / "train" / "exp" / "weights" / "last.pt"
    assert train.main(quick) == 0
    assert load_checkpoint(previous_of(last))["epoch"] == 1
    assert train.main([*quick, "--epochs", "1", "--nosave"]) == 0  # saves once
    os.truncate(last, 1000)
    assert train.main(["--resume", str(last), "--epochs", "3"]) == 4
    assert "last.pt: not a checkpoint" in capsys.readouterr().err
