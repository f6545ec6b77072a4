"""One `up` at a time on a machine: real processes, of two users where the tests run as root."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.errors import EngineError
from launcher.hosts.lock import FOLDERS, NAME, host_lock, lock_path
from launcher.hosts.processes import user_name
from tests.conftest import PYTHON_PATH

HOLD = """
import os, sys, time
from pathlib import Path
from launcher.hosts.lock import host_lock
from starling.core.log_lines import lines_to
"".encode("unicode_escape")  # a codec is a module too
os.umask(0o077)
if len(sys.argv) > 4: os.setuid(int(sys.argv[4]))  # here, as the interpreter may be root's alone
with lines_to(lambda line: print(line, flush=True)):
    with host_lock(folders=[Path(sys.argv[1])], wait_s=float(sys.argv[2])):
        print("held", flush=True)
        time.sleep(float(sys.argv[3]))
"""
NOBODY = 65534


@pytest.fixture
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder as /tmp is: everybody's, and sticky."""
    folder = Path(f"/tmp/starling-lock-{os.getpid()}-{time.monotonic_ns()}")
    folder.mkdir()
    folder.chmod(0o1777)
    yield folder
    for path in folder.iterdir():
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.rmdir()


def hold(
    folder: Path, wait_s: float = 5, for_s: float = 30, user: int | None = None
) -> subprocess.Popen[str]:
    """Start a process that takes the lock; its first line says that it has it, or waits."""
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            HOLD,
            str(folder),
            str(wait_s),
            str(for_s),
            *([] if user is None else [str(user)]),
        ],
        env={**os.environ, "PYTHONPATH": PYTHON_PATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> str:
    process.kill()
    return process.communicate()[1]


def test_this_machine_has_a_place_for_the_lock() -> None:
    assert lock_path().parent in FOLDERS
    assert lock_path().name == NAME


def test_the_second_waits_for_the_first_which_it_names(shared: Path) -> None:
    first = hold(shared)
    assert first_line(first) == "held"
    second = hold(shared)
    assert first_line(second).startswith(f"waiting for {user_name(os.getuid())}'s process {first.pid} (")
    first.send_signal(signal.SIGKILL)  # the kernel releases a dead holder's lock
    assert first_line(second) == "held"
    end(first)
    end(second)


def test_too_long_a_wait_names_the_holder_and_the_remedy(shared: Path, said: list[str]) -> None:
    first = hold(shared)
    assert first_line(first) == "held"
    with pytest.raises(EngineError) as caught, host_lock(folders=[shared], wait_s=0.3):
        pass
    end(first)
    assert f"process {first.pid} (" in str(caught.value)
    assert f"has held {shared / NAME} for over 0.3 s; wait for it, or end it: kill {first.pid}" in str(
        caught.value
    )
    assert caught.value.exit_code == 5
    assert len(said) == 1


def test_a_released_lock_lets_the_next_one_on_before_the_block_ends(shared: Path) -> None:
    with host_lock(folders=[shared]) as lock:
        lock.release()
        second = hold(shared)
        assert first_line(second) == "held"
        end(second)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_file_left_behind_is_harmless_and_readable_for_all(shared: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        for _ in range(2):
            with host_lock(folders=[shared], wait_s=0):
                pass
    finally:
        os.umask(before)
    assert (shared / NAME).stat().st_mode & 0o777 == 0o444
    assert (shared / NAME).stat().st_size == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be two users")
@pytest.mark.parametrize("maker", [0, NOBODY])
def test_a_lock_made_by_another_user_works_both_ways(shared: Path, maker: int) -> None:
    other = NOBODY if maker == 0 else 0
    first = hold(shared, user=maker)
    assert first_line(first) == "held"
    second = hold(shared, user=other)
    assert first_line(second).startswith(f"waiting for {user_name(maker)}'s process {first.pid}")
    end(first)
    assert first_line(second) == "held"
    assert end(second) == ""


def test_a_lock_whose_file_was_removed_is_taken_on_the_new_file(shared: Path) -> None:
    first = hold(shared)
    assert first_line(first) == "held"
    second = hold(shared)
    assert first_line(second).startswith("waiting")
    (shared / NAME).unlink()
    third = hold(shared)
    assert first_line(third) == "held"
    end(first)
    waiting = first_line(second)
    assert waiting.startswith("waiting"), "the new file is another's by now"
    assert f"process {third.pid} " in waiting
    for process in (second, third):
        end(process)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.symlink_to("/etc/passwd"), "a link"),
        (lambda path: path.mkdir(), "not a file"),
        (lambda path: os.mkfifo(path), "not a file"),
    ],
)
def test_what_lies_in_the_locks_place_is_refused_with_the_remedy(
    shared: Path, make: object, words: str
) -> None:
    make(shared / NAME)  # type: ignore[operator]
    with pytest.raises(EngineError, match=words) as caught, host_lock(folders=[shared]):
        pass
    assert f"sudo rm {shared / NAME}" in str(caught.value)


def test_a_folder_of_ones_own_is_no_place_for_a_shared_lock(tmp_path: Path, shared: Path) -> None:
    assert lock_path([tmp_path / "none", tmp_path, shared]) == shared / NAME
    with pytest.raises(EngineError, match="sticky"):
        lock_path([tmp_path])
