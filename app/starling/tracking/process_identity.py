"""Distinguish a process from a later process with the same id."""

from __future__ import annotations

import os
from dataclasses import dataclass

from starling.core.process import stat_of


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process: its id, and its start time (clock ticks since the machine booted, from the kernel)."""

    pid: int
    start: str

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity:
        """Return the identity of a running process; raises ProcessLookupError."""
        start = _start_of(pid)
        if start is None:
            raise ProcessLookupError(f"no process {pid}")
        return cls(pid, start)

    @classmethod
    def parse(cls, text: str) -> ProcessIdentity:
        """Read `PID:START`; raises ValueError."""
        pid, _, start = text.partition(":")
        return cls(int(pid), start)

    def __str__(self) -> str:
        return f"{self.pid}:{self.start}"

    def is_alive(self) -> bool:
        """Return whether this process (not a later one with its id) still runs; a zombie process does not."""
        return _start_of(self.pid) == self.start


def _start_of(pid: int) -> str | None:
    """Return the start time of a running process, or None."""
    stat = stat_of(pid)
    if stat is None:
        return _start_without_proc(pid)
    return None if stat.ended else str(stat.start)


def _start_without_proc(pid: int) -> str | None:
    if os.path.isdir("/proc/self"):
        return None
    import psutil

    try:
        return str(psutil.Process(pid).create_time())
    except psutil.Error:
        return None
