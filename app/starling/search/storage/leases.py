"""Leases show the workers of a search whether a candidate is in training or its worker is gone.

This module keeps leases as files beside a journal; `database_leases.py` gives the same guarantees in a database. A
worker keeps `<search>/leases/0007` while it trains candidate 7. Other workers check the file in two ways:

- The file is under `flock`, which the kernel drops when the holder dies. If the lock is free and was taken under the
  same kernel (all containers of a host share it), the holder is dead.
- The holder touches the file repeatedly. If the modification time has not changed for `lease_s` by the
  *observer's* monotonic clock, the holder is frozen or unreachable. Clocks of two machines are never compared.

The worker that takes a candidate over removes the lease; an old holder that wakes up learns from that that it lost.
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
    """A worker's own lease on a candidate, valid until it is closed, abandoned or lost."""

    def keep_alive(self, every_s: float) -> None:
        """Renew the lease from a thread, so that a long epoch does not look like a dead worker."""

    def renew(self) -> None:
        """Show that the holder is alive; raises LeaseLost if the candidate was taken over."""

    def close(self) -> None:
        """Return the lease after the end of its candidate."""

    def abandon(self) -> None:
        """Let go as a dead worker does: others take the candidate over at once."""


class LeaseWatch(Protocol):
    """An observer of other workers' leases; callers hold the study's lock."""

    def verdict(self, number: int) -> str | None:
        """Return why the candidate's worker is gone, or None while it may be alive."""

    def revoke(self, number: int) -> None:
        """Take a lease from its holder, who notices at the next renewal."""


def lease_path(search: Path, number: int) -> Path:
    """Return the lease file of a candidate."""
    return search / FOLDER / f"{number:04d}"


class FileLease:
    """A worker's own lease; the caller holds the study's lock. Raises OSError if the disk refuses."""

    def __init__(self, path: Path, worker: str, kernel: str | None = None) -> None:
        make_folder(path.parent)
        self._path = path
        # The lease of a worker that died between taking the lease and recording the candidate.
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
        """Renew the lease from a thread, so that a long epoch does not look like a dead worker."""
        self._beat = threading.Thread(target=self._renew_until_stopped, args=(every_s,), daemon=True)
        self._beat.start()

    def renew(self) -> None:
        """Show that the holder is alive; raises LeaseLost if the candidate was taken over."""
        if not self.is_held():
            raise LeaseLost(int(self._path.name))
        with contextlib.suppress(OSError):  # the volume may be unreachable; the next touch may succeed
            os.utime(self._descriptor)

    def is_held(self) -> bool:
        """Return whether the file at the lease's path still belongs to this holder."""
        if self._closed:
            return False
        mine = os.fstat(self._descriptor)
        try:
            there = state_of(self._path)
        except OSError:
            return True
        return there is not None and os.path.samestat(there, mine)

    def close(self) -> None:
        """Return the lease after the end of its candidate."""
        if self.is_held():
            remove(self._path)
        self.abandon()

    def abandon(self) -> None:
        """Release the lock but leave the file, as a dead worker does: others take the candidate over at once."""
        self._stop.set()
        if self._beat is not None:
            self._beat.join()
        if not self._closed:
            self._closed = True
            os.close(self._descriptor)

    def _renew_until_stopped(self, every_s: float) -> None:
        with contextlib.suppress(LeaseLost):  # the training thread gets the error from its own report
            while not self._stop.wait(every_s):
                self.renew()


class Stillness:
    """The time since each lease's mark last changed, by the observer's monotonic clock."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._last_change: dict[int, tuple[object, float]] = {}

    def seconds(self, number: int, mark: object) -> float:
        """Return the seconds since a lease's present mark was first seen; 0 at the first call."""
        now = self._monotonic()
        if number not in self._last_change or self._last_change[number][0] != mark:
            self._last_change[number] = (mark, now)
        return now - self._last_change[number][1]

    def forget(self, number: int) -> None:
        """Forget a lease."""
        self._last_change.pop(number, None)


class FileLeaseWatch:
    """An observer of other workers' leases, which remembers when each last changed."""

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

        The caller must hold the study's lock, because the lease's lock is taken for a moment.
        """
        path = lease_path(self._search, number)
        try:
            status = state_of(path)
        except OSError:
            status = None
        # No lease: a worker died during a takeover, or the folder was removed.
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
        """Return whether the lock is free although it was taken under the present kernel."""
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
