"""What containers use, as the engine itself tells: for those of another machine, whose control groups are out of reach."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launcher.engines.base import Usage

PATIENCE_S = 2.8
"""An engine compares two readings a second apart; what it has not told by then is left out."""


def ask_usage(ask: Callable[[str], Mapping[str, Any]], ids: Sequence[str]) -> dict[str, Usage]:
    """Return what each container uses, all asked at once; `ask` returns the engine's `stats` of one."""
    found: dict[str, Usage] = {}

    def ask_one(replica_id: str) -> None:
        try:
            found[replica_id] = usage_in(ask(replica_id))
        except Exception:  # it has ended, or the engine does not answer: a figure less, and no more
            return

    # Daemon threads, and a bound on all of them: figures are no reason to wait for an engine that hangs.
    threads = [threading.Thread(target=ask_one, args=(item,), daemon=True) for item in ids]
    for thread in threads:
        thread.start()
    until = time.monotonic() + PATIENCE_S
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return dict(found)


def usage_in(stats: Mapping[str, Any]) -> Usage:
    """Return the memory without page cache, and the CPU as a rate where there were two readings."""
    memory = stats.get("memory_stats") or {}
    detail = memory.get("stats") or {}
    cached = detail.get("total_inactive_file", detail.get("inactive_file", 0))
    used = memory.get("usage")
    now, before = _cpu(stats.get("cpu_stats")), _cpu(stats.get("precpu_stats"))
    return Usage(
        memory_bytes=None if used is None else max(int(used) - int(cached), 0),
        cpu_s=now[0],
        at=time.monotonic(),
        cpu_percent=_percent(now, before, (stats.get("cpu_stats") or {}).get("online_cpus")),
    )


def _cpu(part: Mapping[str, Any] | None) -> tuple[float, float]:
    """Return the seconds that the container and that the whole machine have computed."""
    part = part or {}
    own = (part.get("cpu_usage") or {}).get("total_usage") or 0
    return own / 1e9, (part.get("system_cpu_usage") or 0) / 1e9


def _percent(now: tuple[float, float], before: tuple[float, float], cores: int | None) -> float | None:
    if not before[1] or now[1] <= before[1] or now[0] < before[0]:
        return None
    return 100 * (now[0] - before[0]) / (now[1] - before[1]) * (cores or 1)
