"""A user's file that the trainer may not read, or not even look at: its exit code, one message, and nothing begun."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from starling.cli import detect, train, val
from starling.core.errors import UsageError
from starling.tracking.clearml.client.credentials import find_credentials, is_configured
from tests.conftest import MINI_SET, TINY_LAYOUT

TRAIN = (
    *("--data", "{data}/bccd.yaml", "--weights", "", "--cfg", "{own}/tiny.yaml"),
    *("--img", "64", "--epochs", "1", "--device", "cpu", "--noplots"),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset and a file of each kind."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "data").mkdir()
    for name in ("images", "labels"):
        shutil.copytree(MINI_SET / name, folder / "data" / name)
    shutil.copy(MINI_SET / "bccd.yaml", folder / "data")
    own = folder / "own"
    own.mkdir()
    shutil.copy(TINY_LAYOUT, own)
    (own / "hyp.yaml").write_text("lr0: 0.01\n")
    (own / "space.yaml").write_text("lr0: {lower: 0.001, upper: 0.1}\n")
    (folder / "choices.yaml").write_text("cfg: [own/wide.yaml, own/tiny.yaml]\n")
    shutil.copy(TINY_LAYOUT, own / "wide.yaml")
    (own / "hooks.py").write_text("def on_train_start(training): ...\n")
    for name in ("w.pt", "last.pt"):
        (own / name).write_bytes(b"x")
    shutil.copy(MINI_SET / "bccd.yaml", own / "own.yaml")
    (folder / "w.pt").write_bytes(b"x")
    return folder


@contextmanager
def shut(path: Path) -> Iterator[None]:
    """Let nobody at a path, and be nobody who may all the same: root has no right beyond the mode, as in a replica."""
    before = path.stat().st_mode & 0o7777
    path.chmod(0)
    try:
        with no_override():
            yield
    finally:
        path.chmod(before)


@contextmanager
def no_override() -> Iterator[None]:
    """Give up CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH for a while; threads that are started meanwhile do not have them."""
    libc = ctypes.CDLL(None, use_errno=True)
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    held = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: numbers 0 to 31, then the rest
    assert libc.capget(head, held) == 0, os.strerror(ctypes.get_errno())
    fewer = type(held)(*held)
    fewer[0] &= ~(1 << 1 | 1 << 2)
    assert libc.capset(head, fewer) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        assert libc.capset(head, held) == 0, os.strerror(ctypes.get_errno())


@pytest.mark.parametrize("where", ["file", "folder"])
@pytest.mark.parametrize(
    ("command", "words", "unreadable", "code"),
    [
        (train.main, TRAIN, "own/tiny.yaml", 2),
        (train.main, (*TRAIN, "--hyp", "{own}/hyp.yaml"), "own/hyp.yaml", 2),
        (train.main, (*TRAIN, "--cfg", "yolov5n.yaml", "--hooks", "{own}/hooks.py"), "own/hooks.py", 2),
        (train.main, (*TRAIN, "--evolve", "1", "--space", "{own}/space.yaml"), "own/space.yaml", 2),
        (train.main, (*TRAIN, "--evolve", "1", "--space", "{home}/choices.yaml"), "own/wide.yaml", 2),
        (train.main, (*TRAIN, "--cfg", "yolov5n.yaml", "--weights", "{own}/w.pt"), "own/w.pt", 4),
        (train.main, ("--resume", "{own}/last.pt"), "own/last.pt", 4),
        (train.main, (*TRAIN, "--cfg", "yolov5n.yaml", "--data", "{own}/own.yaml"), "own/own.yaml", 3),
        (train.main, TRAIN, "data/images/train", 3),
        (train.main, TRAIN, "data/images/val", 3),
        (val.main, ("--weights", "{own}/w.pt", "--data", "{data}/bccd.yaml"), "own/w.pt", 4),
        (val.main, ("--weights", "{home}/w.pt", "--data", "{own}/own.yaml"), "own/own.yaml", 3),
        (detect.main, ("--weights", "{own}/w.pt", "--source", "{data}/images/val"), "own/w.pt", 4),
        (detect.main, ("--weights", "{own}/w.pt", "--source", "{data}/images/val"), "data/images/val", 3),
    ],
)
def test_a_file_that_may_not_be_read_is_one_message_with_its_exit_code(
    command: Callable[[list[str]], int],
    words: tuple[str, ...],
    unreadable: str,
    code: int,
    where: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv("STARLING_RUNS", str(home / "runs"))
    path = home / unreadable
    given = [word.format(home=home, own=home / "own", data=home / "data") for word in words]
    with shut(path if where == "file" else path.parent):
        ended = command(given)
    said = capfd.readouterr()
    assert ended == code, said
    [line] = said.err.splitlines()
    assert line.startswith("error: ")
    assert f"{path if where == 'file' or code != 3 else path.parent}" in line
    assert "cannot be read: Permission denied for uid" in line
    assert "check the owner and the mode" in line
    assert not (home / "runs").exists()


def test_clearmls_file_that_may_not_be_looked_at_stops_who_needs_it_and_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "shut" / "clearml.conf"
    path.parent.mkdir()
    path.touch()
    environment = {"CLEARML_CONFIG_FILE": str(path)}
    with shut(path.parent):
        assert is_configured(environment), "whoever reads it says why it cannot"
        with pytest.raises(UsageError, match=f"{path}: cannot be read: Permission denied"):
            find_credentials(environment)
