"""Leases: who is alive, by the kernel's locks and by the observer's own clock."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from starling.search.outcome import LeaseLost
from starling.search.storage.leases import FileLease, FileLeaseWatch, lease_path


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def watch(tmp_path: Path, clock: Clock, kernel: str = "this kernel") -> FileLeaseWatch:
    """Return an observer that is patient for 100 s."""
    return FileLeaseWatch(tmp_path, 100, monotonic=clock, kernel=kernel)


def test_lock_that_this_kernel_no_longer_holds_means_dead_at_once(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        FileLease(lease_path(tmp_path, 7), "w", kernel="this kernel")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert watch(tmp_path, Clock()).verdict(7) == "its worker died"


def test_free_lock_of_another_kernel_proves_nothing(tmp_path: Path) -> None:
    FileLease(lease_path(tmp_path, 7), "w", kernel="another host's").abandon()
    clock = Clock()
    observer = watch(tmp_path, clock)
    assert observer.verdict(7) is None
    clock.now += 101
    assert "no sign of life" in str(observer.verdict(7))


def test_holder_that_does_not_renew_is_gone_after_the_lease(tmp_path: Path) -> None:
    lease, clock = FileLease(lease_path(tmp_path, 7), "w", kernel="this kernel"), Clock()
    observer = watch(tmp_path, clock)
    assert observer.verdict(7) is None
    clock.now += 99
    assert observer.verdict(7) is None
    clock.now += 2
    assert "100 s" in str(observer.verdict(7))
    lease.close()


@pytest.mark.parametrize("skew_s", [-86_400, 0, 86_400])
def test_renewing_holder_is_alive_whatever_its_clock_says(tmp_path: Path, skew_s: int) -> None:
    lease, clock = FileLease(lease_path(tmp_path, 7), "w"), Clock()
    observer = watch(tmp_path, clock)
    for tick in range(5):
        os.utime(lease_path(tmp_path, 7), (0, time.time() + skew_s + tick))
        assert observer.verdict(7) is None
        clock.now += 99
    lease.close()


def test_missing_lease_is_given_the_same_patience(tmp_path: Path) -> None:
    clock = Clock()
    observer = watch(tmp_path, clock)
    assert observer.verdict(7) is None
    clock.now += 101
    assert observer.verdict(7) is not None


def test_holder_of_a_revoked_lease_learns_that_it_lost(tmp_path: Path) -> None:
    lease = FileLease(lease_path(tmp_path, 7), "w")
    lease.renew()
    watch(tmp_path, Clock()).revoke(7)
    with pytest.raises(LeaseLost, match="candidate 7"):
        lease.renew()
    lease.close()


def test_loser_does_not_remove_the_lease_of_another(tmp_path: Path) -> None:
    loser = FileLease(lease_path(tmp_path, 7), "loser")
    watch(tmp_path, Clock()).revoke(7)
    winner = FileLease(lease_path(tmp_path, 7), "winner")
    loser.close()
    winner.renew()
    winner.close()
    assert not lease_path(tmp_path, 7).exists()


def test_thread_renews_while_training_is_silent(tmp_path: Path) -> None:
    lease = FileLease(lease_path(tmp_path, 7), "w")
    before = lease_path(tmp_path, 7).stat().st_mtime_ns
    lease.keep_alive(0.01)
    deadline = time.monotonic() + 5
    while lease_path(tmp_path, 7).stat().st_mtime_ns == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lease.close()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_unreadable_lease_is_judged_by_time(tmp_path: Path, content: bytes) -> None:
    path, clock = lease_path(tmp_path, 7), Clock()
    path.parent.mkdir()
    path.write_bytes(content)
    observer = watch(tmp_path, clock)
    assert observer.verdict(7) is None
    clock.now += 101
    assert observer.verdict(7) is not None
