"""Read processes from `/proc`, and the id of the current boot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

PROC = "/proc"


class Stat(NamedTuple):
    """The fields of `/proc/PID/stat`."""

    state: str
    parent: int
    session: int
    ticks: int
    """CPU time in clock ticks: the process's own, and its reaped children's."""
    start: int
    """Clock ticks from the boot to the process's start; together with the pid, it identifies the process."""
    resident_pages: int

    @property
    def ended(self) -> bool:
        """Whether the process has ended and only waits to be reaped (a zombie)."""
        return self.state in ("Z", "X")


def stat_of(pid: int, proc: str | os.PathLike[str] = PROC) -> Stat | None:
    """Return the kernel's fields of a process; None if the process does not exist or is hidden."""
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
    """Yield the pid and the fields of each process."""
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
