"""A lock whose file somebody removes never lets two in: neither one who waits for it, nor one who comes later."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from launcher.hosts.lock import host_lock, lock_path
from starling.core.errors import UsageError
from starling.core.lock import is_at, lock_own, take, try_flock, wait_for
from starling.data.fetch.download import only_one
from starling.outputs.run_dir import LOCK as RUN_LOCK
from starling.outputs.run_dir import run_lock
from starling.search.storage.journal import LOCK as STUDY_LOCK
from starling.search.storage.journal import JournalStudyStorage, locked
from starling.search.winner import weights_locked
from starling.tracking.lock import exclusive

Lock = Callable[[Path], AbstractContextManager[None]]
LOCKS: dict[str, Lock] = {
    ".target.lock": lambda path: only_one(path.with_name("target")),
    "bridge.lock": lambda path: exclusive(path, 10, poll_s=0.01),
    "weights.lock": locked,
}


@pytest.mark.parametrize("name", LOCKS)
def test_who_waited_for_a_lock_whose_file_was_removed_locks_the_new_one(tmp_path: Path, name: str) -> None:
    path, lock = tmp_path / name, LOCKS[name]
    inside, leave = threading.Event(), threading.Event()

    def wait_and_hold() -> None:
        with lock(path):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=wait_and_hold)
    with lock(path):
        thread.start()
        assert not inside.wait(0.1)
        path.unlink()
    assert inside.wait(10)
    descriptor = os.open(path, os.O_RDWR)  # the new file is there, and held
    assert not try_flock(descriptor)
    os.close(descriptor)
    leave.set()
    thread.join()


def test_a_run_whose_lock_file_was_removed_is_refused_to_a_second_trainer(tmp_path: Path) -> None:
    with run_lock(tmp_path / "run"):
        (tmp_path / "run" / RUN_LOCK).unlink()
        with pytest.raises(UsageError, match="already in use"), run_lock(tmp_path / "run"):
            pass
    with run_lock(tmp_path / "run"):
        pass


def test_a_study_whose_lock_file_was_removed_lets_nobody_in_before_its_holder_is_out(tmp_path: Path) -> None:
    first, second = JournalStudyStorage(tmp_path), JournalStudyStorage(tmp_path)
    inside = threading.Event()

    def enter() -> None:
        with second.lock():
            inside.set()

    thread = threading.Thread(target=enter)
    with first.lock():
        (tmp_path / STUDY_LOCK).unlink()
        thread.start()
        assert not inside.wait(0.3)
    assert inside.wait(10)
    thread.join()


def test_the_weights_of_a_search_whose_lock_file_was_removed_have_one_writer(tmp_path: Path) -> None:
    inside = threading.Event()

    def enter() -> None:
        with weights_locked(tmp_path):
            inside.set()

    thread = threading.Thread(target=enter)
    with weights_locked(tmp_path):
        (tmp_path / "weights.lock").unlink()
        thread.start()
        assert not inside.wait(0.3)
    assert inside.wait(10)
    thread.join()


def test_a_lock_is_given_only_on_the_file_that_the_path_names(tmp_path: Path) -> None:
    path, opened = tmp_path / "lock", []

    def replaced_at_first() -> int:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        opened.append(descriptor)
        if len(opened) == 1:
            path.unlink()
        return descriptor

    descriptor, free = take(path, replaced_at_first)
    assert free
    assert len(opened) == 2
    assert is_at(descriptor, path)
    os.close(descriptor)


def test_who_waits_hears_of_it_once_or_again_and_gives_up_at_the_limit(tmp_path: Path) -> None:
    said: list[float] = []

    def tell() -> None:
        said.append(time.monotonic())

    with open(tmp_path / "lock", "w") as mine, open(tmp_path / "lock") as other:
        lock_own(mine.fileno())

        def attempt() -> bool:
            return try_flock(other.fileno())

        began = time.monotonic()
        assert not wait_for(attempt, limit_s=0.3, tell=tell)
        assert 0.3 <= time.monotonic() - began < 2
        assert len(said) == 1
        assert not wait_for(attempt, limit_s=0.3, tell=tell, patience_s=0.1, again_s=0.05, poll_s=0.01)
        assert said[1] - began >= 0.4
        assert len(said) > 3
        assert not wait_for(attempt, limit_s=0, tell=tell, patience_s=0)
        with pytest.raises(BlockingIOError):
            lock_own(other.fileno())
        threading.Timer(0.2, lambda: fcntl.flock(mine, fcntl.LOCK_UN)).start()
        assert wait_for(attempt)


def test_a_shared_lock_goes_with_others_and_excludes_the_exclusive_one(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    with open(tmp_path / "lock") as one, open(tmp_path / "lock") as two, open(tmp_path / "lock") as three:
        assert try_flock(one.fileno(), shared=True)
        assert try_flock(two.fileno(), shared=True)
        assert not try_flock(three.fileno())


def test_a_machine_lock_whose_file_was_removed_lets_who_waited_lock_the_new_one(
    tmp_path: Path, said: list[str]
) -> None:
    tmp_path.chmod(0o1777)
    inside = threading.Event()

    def enter() -> None:
        with host_lock(folders=[tmp_path], wait_s=10):
            inside.set()

    thread = threading.Thread(target=enter)
    with host_lock(folders=[tmp_path]):
        thread.start()
        while not said:
            time.sleep(0.01)
        lock_path([tmp_path]).unlink()
    assert inside.wait(10)
    thread.join()
    assert lock_path([tmp_path]).is_file()
