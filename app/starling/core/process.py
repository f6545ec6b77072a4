"""Processes as the kernel shows them in `/proc`, and which start of the machine they belong to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

PROC = "/proc"


class Stat(NamedTuple):
    """What `/proc/PID/stat` says of a process."""

    state: str
    parent: int
    session: int
    ticks: int
    """Of processors' time, in the machine's clock ticks: its own, and that of the children it has buried."""
    start: int
    """Clock ticks from the machine's start to the process's: with the pid, it names one process and no later one."""
    resident_pages: int

    @property
    def ended(self) -> bool:
        """Whether it only waits to be buried."""
        return self.state in ("Z", "X")


def stat_of(pid: int, proc: str | os.PathLike[str] = PROC) -> Stat | None:
    """Return what the kernel says of a process; None for one that has gone, or that nobody shows."""
    try:
        with open(os.path.join(proc, str(pid), "stat"), "rb") as file:
            # The command's name, in brackets, may itself hold spaces and brackets.
            fields = file.read().rpartition(b")")[2].split()
        return Stat(
            state=fields[0].decode(),
            parent=int(fields[1]),
            session=int(fields[3]),
            ticks=sum(map(int, fields[11:15])),
            start=int(fields[19]),
            resident_pages=int(fields[21]),
        )
    except (OSError, ValueError, IndexError):
        return None


def all_stats(proc: str | os.PathLike[str] = PROC) -> Iterator[tuple[int, Stat]]:
    """Yield each process that is there, by its id."""
    for name in os.listdir(proc):
        stat = stat_of(int(name), proc) if name.isdigit() else None
        if stat is not None:
            yield int(name), stat


def boot_id() -> str:
    """Return the identity of the running kernel, the same in every container of a host; empty if unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
