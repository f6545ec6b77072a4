"""What a container of this machine uses, read from its control group: in microseconds, where engines take a second."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from launcher.engines.base import Usage


def read_usage(
    pid: int, name: str, proc: Path = Path("/proc"), root: Path = Path("/sys/fs/cgroup")
) -> Usage | None:
    """Return the memory and the CPU time of the control group that holds process `pid`.

    None unless its path has `name`, the container's id, in it: a number that comes from another machine, or another
    namespace, means some other process here.
    """
    try:
        lines = (proc / str(pid) / "cgroup").read_text().splitlines()
    except OSError:
        return None
    memory = cpu = None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if name not in path:
            continue
        below = path.lstrip("/")
        if not controllers:
            memory = _memory_v2(root / below) if memory is None else memory
            cpu = _cpu_v2(root / below) if cpu is None else cpu
        elif "memory" in controllers.split(","):
            memory = _memory_v1(root / "memory" / below)
        elif "cpuacct" in controllers.split(","):
            cpu = _cpu_v1(root, controllers, below)
    if memory is None and cpu is None:
        return None
    return Usage(memory_bytes=memory, cpu_s=cpu, at=time.monotonic())


def _memory_v1(folder: Path) -> int | None:
    return _without_cache(folder, "memory.usage_in_bytes", "total_inactive_file")


def _memory_v2(folder: Path) -> int | None:
    return _without_cache(folder, "memory.current", "inactive_file")


def _without_cache(folder: Path, total: str, cache: str) -> int | None:
    """Return what is used, less the cached files that the kernel would drop first: as `docker stats` counts."""
    try:
        used = int((folder / total).read_text())
        cached = dict(_pairs(folder / "memory.stat")).get(cache, 0)
    except (OSError, ValueError):
        return None
    return max(used - cached, 0)


def _cpu_v1(root: Path, controllers: str, below: str) -> float | None:
    for mount in ("cpuacct", controllers):
        try:
            return int((root / mount / below / "cpuacct.usage").read_text()) / 1e9
        except (OSError, ValueError):
            continue
    return None


def _cpu_v2(folder: Path) -> float | None:
    try:
        return dict(_pairs(folder / "cpu.stat"))["usage_usec"] / 1e6
    except (OSError, ValueError, KeyError):
        return None


def _pairs(path: Path) -> Iterator[tuple[str, int]]:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(" ")
        yield key, int(value)
