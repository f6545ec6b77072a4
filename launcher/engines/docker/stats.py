"""The usage of containers from the engine's statistics, for machines whose control groups cannot be read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launcher.hosts.usage import Usage
from starling.core.units import parse_stamp

PATIENCE_S = 2.8
"""An engine that samples once a second answers within this time; figures of slower engines are left out."""


def ask_usage(ask: Callable[[str], Mapping[str, Any]], ids: Sequence[str]) -> dict[str, Usage]:
    """Return the usage of each container, read in parallel; `ask` returns one reading of a container's `stats`."""
    found: dict[str, Usage] = {}

    def ask_one(replica_id: str) -> None:
        try:
            found[replica_id] = usage_in(ask(replica_id))
        except Exception:  # the container has ended or the engine does not answer: leave its figures out
            return

    # Daemon threads with one common deadline: usage figures must not delay the command if the engine hangs.
    threads = [threading.Thread(target=ask_one, args=(item,), daemon=True) for item in ids]
    for thread in threads:
        thread.start()
    until = time.monotonic() + PATIENCE_S
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return dict(found)


def usage_in(stats: Mapping[str, Any]) -> Usage:
    """Return the memory without page cache, the CPU time, and the engine's time of the reading."""
    memory = stats.get("memory_stats") or {}
    detail = memory.get("stats") or {}
    cached = detail.get("total_inactive_file", detail.get("inactive_file", 0))
    used = memory.get("usage")
    computed = ((stats.get("cpu_stats") or {}).get("cpu_usage") or {}).get("total_usage")
    return Usage(
        memory_bytes=None if used is None else max(int(used) - int(cached), 0),
        cpu_s=None if computed is None else computed / 1e9,
        at=time.monotonic(),
        clock=parse_stamp(stats.get("read") or ""),
    )
