"""What the processes of one session use: a local replica is a session, whoever its processes' parents are by now."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from pathlib import Path

from launcher.engines.base import Usage
from starling.core.process import all_stats


def read_sessions(sessions: Collection[int], proc: Path = Path("/proc")) -> dict[int, Usage]:
    """Return the resident memory and the CPU time of each session's processes, in one walk over all processes.

    Pages that several processes share are counted for each of them.
    """
    tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    memory = dict.fromkeys(sessions, 0)
    ticks = dict.fromkeys(sessions, 0)
    seen = set()
    for _, stat in all_stats(proc):
        if stat.session in memory:
            seen.add(stat.session)
            memory[stat.session] += stat.resident_pages * page
            ticks[stat.session] += stat.ticks
    now = time.monotonic()
    return {
        session: Usage(memory_bytes=memory[session], cpu_s=ticks[session] / tick, at=now) for session in seen
    }
