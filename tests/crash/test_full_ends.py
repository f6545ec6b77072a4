"""A disk that fills up at any single write of the end of a training: exit 6 or a line, and a resume finishes the end."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from starling import settings
from starling.cli import train
from tests.conftest import REPOSITORY
from tests.crash.conftest import Start

TIMES = ("events.jsonl", ".lock")


@pytest.fixture(autouse=True)
def no_tracking(runs: Path) -> None:
    """Keep the bridge out: it has tests of its own."""
    settings.update({"mlflow": False, "tensorboard": False})


@contextmanager
def full_for(full: str) -> Iterator[list[str]]:
    """Leave no room for the files of one name, by the kernel's means; yield the names that are opened for writing.

    From such a file on nothing can be written, until another one is opened.
    """
    names: list[str] = []
    whole = os.open

    def counted(path: str, flags: int, *args: int, **options: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            names.append(re.sub(r"^\.(.+)\.[0-9a-f]{32}\.part$", r"\1", Path(path).name))
            limit = 0 if names[-1] == full else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return whole(path, flags, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", counted)
        try:
            yield names
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def contents(run: Path) -> dict[str, bytes]:
    """Return what a run holds, by name: all but what holds times."""
    kept = (
        path
        for path in run.rglob("*")
        if path.is_file() and path.name not in TIMES and path.suffix != ".part"
    )
    return {str(path.relative_to(run)): path.read_bytes() for path in kept}


@pytest.fixture
def ended(start: Start, tiny_args: list[str], runs: Path) -> Path:
    """Return the folder of a training that was killed right behind the last save of its last epoch."""
    trainer = start([*tiny_args, "--name", "one"], ("die_in_the_end", "2", "1"))
    assert trainer.wait(180) == -signal.SIGKILL, trainer.output
    run = runs / "train" / "one"
    for leftover in run.rglob("*.part"):
        leftover.unlink()
    return run


def test_a_disk_that_fills_up_at_any_file_of_the_end_is_6_or_a_line_and_a_resume_finishes(
    ended: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = ended.with_name("before")
    ended.rename(before)

    def again() -> int:
        capsys.readouterr()
        return train.main(["--resume", str(ended)])

    def put_back() -> None:
        shutil.rmtree(ended, ignore_errors=True)
        shutil.copytree(before, ended)

    put_back()
    with full_for("") as names:
        assert again() == 0
    old, whole = contents(before), contents(ended)
    made = {Path(name).name for name, content in whole.items() if old.get(name) != content}
    assert made <= {*names}, "each file of the end is filled up below"
    there = {path.name for path in runs.rglob("*") if path.is_file()}
    for name in (name for name in dict.fromkeys(names) if name in there):  # in the order of the end
        if (ended / "summary.json").exists():
            put_back()
        with full_for(name):  # in what the one before has left
            code = again()
        said = "".join(capsys.readouterr())
        can_do_without = name == "events.jsonl" or (name.endswith(".json") and "-" in name)  # the status
        assert code == (0 if can_do_without else 6), (name, said)
        [line] = [line for line in said.splitlines() if "File too large" in line]
        assert name in line
        assert not list(ended.rglob("*.part"))
        kept = contents(ended)
        assert old.keys() <= kept.keys()
        assert all(content in (old.get(path), whole[path]) for path, content in kept.items()), name
    assert again() == 0
    assert contents(ended) == whole


def test_a_console_on_a_full_disk_ends_with_6_though_nobody_can_be_told(
    tiny_args: list[str], runs: Path
) -> None:
    command = [sys.executable, "app/train.py", *tiny_args, "--noplots", "--noval", "--epochs", "1"]
    with open("/dev/full", "w") as full:
        silent = subprocess.run(command, cwd=REPOSITORY, stdout=full, stderr=full)
        told = subprocess.run(command, cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (silent.returncode, told.returncode) == (6, 6)
    assert told.stderr.startswith("error: the console: cannot be written (No space left on device)")
    assert told.stderr.count("\n") == 1
