"""What the processes of one session use: a local replica is a session, whoever its processes' parents are by now."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from pathlib import Path

from launcher.engines.base import Usage

_PARENT_SESSION = 3
"""Field of /proc/PID/stat after the command's name; those below count alike (proc(5), less three)."""
_TIMES = slice(11, 15)
_RESIDENT = 21


def read_sessions(sessions: Collection[int], proc: Path = Path("/proc")) -> dict[int, Usage]:
    """Return the resident memory and the CPU time of each session's processes, in one walk over all processes.

    Pages that several processes share are counted for each of them.
    """
    tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    memory = dict.fromkeys(sessions, 0)
    ticks = dict.fromkeys(sessions, 0)
    seen = set()
    for entry in os.scandir(proc):
        if not entry.name.isdigit():
            continue
        try:
            fields = (proc / entry.name / "stat").read_bytes().rpartition(b")")[2].split()
            session = int(fields[_PARENT_SESSION])
        except (OSError, ValueError, IndexError):
            continue
        if session in memory:
            seen.add(session)
            memory[session] += int(fields[_RESIDENT]) * page
            ticks[session] += sum(map(int, fields[_TIMES]))  # its own, and of the children it has buried
    now = time.monotonic()
    return {
        session: Usage(memory_bytes=memory[session], cpu_s=ticks[session] / tick, at=now) for session in seen
    }
