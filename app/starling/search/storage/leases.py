"""Leases: how the workers of a search tell a candidate in training from one whose worker is gone.

In the search's folder, beside a journal (`database_leases.py` makes the same promises without one): a worker keeps `<search>/leases/0007` for as long as it trains candidate 7. Others read it in two ways:

- The file is under `flock`, which the kernel drops when the holder dies. A free lock that was taken under the same
  kernel (all containers of a host share it) means dead, at once.
- The holder touches the file again and again. A modification time that has not changed for `lease_s` by the
  *observer's* monotonic clock means frozen or out of reach. Clocks of two machines are never compared.

Whoever takes a candidate over removes the lease, by which the old holder, should it wake up, learns that it lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from starling.core.files.refusals import disk_write
from starling.core.files.safe_open import make_folder, open_file, remove, state_of
from starling.core.lock import lock_own, try_flock
from starling.core.plain_json import parse_json
from starling.core.process import boot_id
from starling.search.outcome import LeaseLost

FOLDER = "leases"


class Lease(Protocol):
    """A worker's own lease, which is its candidate's until it is closed, abandoned or lost."""

    def keep_alive(self, every_s: float) -> None:
        """Renew the lease from a thread, so that a long epoch is not taken for death."""

    def renew(self) -> None:
        """Show that the holder is alive; raises LeaseLost if the candidate was taken over."""

    def close(self) -> None:
        """Give the lease back: its candidate has ended."""

    def abandon(self) -> None:
        """Let go as death would: others take the candidate over at once."""


class LeaseWatch(Protocol):
    """An observer's memory of other workers' leases; to be asked while the study is locked."""

    def verdict(self, number: int) -> str | None:
        """Return why the candidate's worker is gone, or None while it may be alive."""

    def revoke(self, number: int) -> None:
        """Take a lease from its holder, who learns of it at the next renewal."""


def lease_path(search: Path, number: int) -> Path:
    """Return the lease file of a candidate."""
    return search / FOLDER / f"{number:04d}"


class FileLease:
    """A worker's own lease; to be taken while the study is locked. Raises OSError where the disk refuses."""

    def __init__(self, path: Path, worker: str, kernel: str | None = None) -> None:
        make_folder(path.parent)
        self._path = path
        # Left by a worker that died between taking the lease and recording the candidate.
        remove(path)
        holder = {"worker": worker, "pid": os.getpid(), "kernel": boot_id() if kernel is None else kernel}
        self._descriptor = open_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            lock_own(self._descriptor)
            with disk_write(path):
                os.write(self._descriptor, json.dumps(holder).encode())
        except OSError:
            os.close(self._descriptor)
            raise
        self._closed = False
        self._stop = threading.Event()
        self._beat: threading.Thread | None = None

    def keep_alive(self, every_s: float) -> None:
        """Renew the lease from a thread, so that a long epoch is not taken for death."""
        self._beat = threading.Thread(target=self._renew_until_stopped, args=(every_s,), daemon=True)
        self._beat.start()

    def renew(self) -> None:
        """Show that the holder is alive; raises LeaseLost if the candidate was taken over."""
        if not self.is_held():
            raise LeaseLost(int(self._path.name))
        with contextlib.suppress(OSError):  # a volume out of reach for a moment; the next touch may do
            os.utime(self._descriptor)

    def is_held(self) -> bool:
        """Return whether the file at the lease's path is still this holder's own."""
        if self._closed:
            return False
        mine = os.fstat(self._descriptor)
        try:
            there = state_of(self._path)
        except OSError:
            return True
        return there is not None and os.path.samestat(there, mine)

    def close(self) -> None:
        """Give the lease back: its candidate has ended."""
        if self.is_held():
            remove(self._path)
        self.abandon()

    def abandon(self) -> None:
        """Let go but leave the file, as death would: others take the candidate over at once."""
        self._stop.set()
        if self._beat is not None:
            self._beat.join()
        if not self._closed:
            self._closed = True
            os.close(self._descriptor)

    def _renew_until_stopped(self, every_s: float) -> None:
        with contextlib.suppress(LeaseLost):  # the training thread hears of it from its own report
            while not self._stop.wait(every_s):
                self.renew()


class Stillness:
    """How long the marks of leases have not changed, by the observer's own monotonic clock."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._last_change: dict[int, tuple[object, float]] = {}

    def seconds(self, number: int, mark: object) -> float:
        """Return the seconds since a lease's mark was first seen as it is now; 0 at the first look."""
        now = self._monotonic()
        if number not in self._last_change or self._last_change[number][0] != mark:
            self._last_change[number] = (mark, now)
        return now - self._last_change[number][1]

    def forget(self, number: int) -> None:
        """Begin anew with a lease."""
        self._last_change.pop(number, None)


class FileLeaseWatch:
    """An observer's memory of other workers' leases."""

    def __init__(
        self,
        search: Path,
        lease_s: float,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        kernel: str | None = None,
    ) -> None:
        self._search = search
        self._lease_s = lease_s
        self._kernel = boot_id() if kernel is None else kernel
        self._stillness = Stillness(monotonic)

    def verdict(self, number: int) -> str | None:
        """Return why the candidate's worker is gone, or None while it may be alive.

        To be called while the study is locked: the lease's lock is tried for a moment.
        """
        path = lease_path(self._search, number)
        try:
            status = state_of(path)
        except OSError:
            status = None
        # No lease: whoever reclaimed it died half way, or the folder was removed.
        mark = None if status is None else (status.st_ino, status.st_mtime_ns)
        if mark is not None and self._holder_died(path):
            return "its worker died"
        if self._stillness.seconds(number, mark) >= self._lease_s:
            return f"its worker gave no sign of life for {self._lease_s:g} s"
        return None

    def revoke(self, number: int) -> None:
        """Remove a lease, so that its holder stops."""
        remove(lease_path(self._search, number))
        self._stillness.forget(number)

    def _holder_died(self, path: Path) -> bool:
        """Return whether the lock is free although this very kernel had given it out."""
        if not self._kernel:
            return False
        try:
            descriptor = open_file(path, os.O_RDWR)
        except OSError:
            return False
        try:
            holder = parse_json(os.read(descriptor, 4096) or b"{}")
            if not isinstance(holder, dict) or holder.get("kernel") != self._kernel:
                return False
            return try_flock(descriptor)
        except (OSError, ValueError):
            return False
        finally:
            os.close(descriptor)
