"""What a container uses, read from its control group: in microseconds, where engines take a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launcher.engines.base import Usage

PROC, ROOT = Path("/proc"), Path("/sys/fs/cgroup")

Read = Callable[[Path], str]
"""Returns a file's text; raises OSError."""


def read_usage(pid: int, name: str, proc: Path = PROC, root: Path = ROOT) -> Usage | None:
    """Return the memory and the CPU time of the control group that holds process `pid` of this machine.

    None unless its path has `name`, the container's id, in it: a number that comes from another machine, or another
    namespace, means some other process here.
    """
    try:
        groups = (proc / str(pid) / "cgroup").read_text()
    except OSError:
        return None
    return usage_in(groups, name, Path.read_text, root)


def usage_in(groups: str, name: str, read: Read, root: Path = ROOT) -> Usage | None:
    """Return what the groups use that a process's `cgroup` file lists, as far as they have `name` in their path."""
    memory = cpu = None
    for controllers, below in _groups(groups, name):
        if not controllers:
            memory = _memory_v2(root / below, read) if memory is None else memory
            cpu = _cpu_v2(root / below, read) if cpu is None else cpu
        elif "memory" in controllers.split(","):
            memory = _memory_v1(root / "memory" / below, read)
        elif "cpuacct" in controllers.split(","):
            cpu = _cpu_v1(root, controllers, below, read)
    if memory is None and cpu is None:
        return None
    return Usage(memory_bytes=memory, cpu_s=cpu, at=time.monotonic())


def files_of(groups: str, name: str, root: Path = ROOT) -> list[Path]:
    """Return the files that `usage_in` may read, for a machine whose files are fetched all at once."""
    files: list[Path] = []
    for controllers, below in _groups(groups, name):
        if not controllers:
            files += [root / below / file for file in ("memory.current", "memory.stat", "cpu.stat")]
        elif "memory" in controllers.split(","):
            files += [root / "memory" / below / file for file in ("memory.usage_in_bytes", "memory.stat")]
        elif "cpuacct" in controllers.split(","):
            files += [root / mount / below / "cpuacct.usage" for mount in _cpu_mounts(controllers)]
    return files


def _groups(text: str, name: str) -> Iterator[tuple[str, str]]:
    """Yield the controllers of each group that has `name` in its path, and that path below the controllers' root."""
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if name in path:
            yield controllers, path.lstrip("/")


def _memory_v1(folder: Path, read: Read) -> int | None:
    return _without_cache(folder, "memory.usage_in_bytes", "total_inactive_file", read)


def _memory_v2(folder: Path, read: Read) -> int | None:
    return _without_cache(folder, "memory.current", "inactive_file", read)


def _without_cache(folder: Path, total: str, cache: str, read: Read) -> int | None:
    """Return what is used, less the cached files that the kernel would drop first: as `docker stats` counts."""
    try:
        used = int(read(folder / total))
        cached = dict(_pairs(read(folder / "memory.stat"))).get(cache, 0)
    except (OSError, ValueError):
        return None
    return max(used - cached, 0)


def _cpu_v1(root: Path, controllers: str, below: str, read: Read) -> float | None:
    for mount in _cpu_mounts(controllers):
        try:
            return int(read(root / mount / below / "cpuacct.usage")) / 1e9
        except (OSError, ValueError):
            continue
    return None


def _cpu_mounts(controllers: str) -> tuple[str, ...]:
    return ("cpuacct", controllers)


def _cpu_v2(folder: Path, read: Read) -> float | None:
    try:
        return dict(_pairs(read(folder / "cpu.stat")))["usage_usec"] / 1e6
    except (OSError, ValueError, KeyError):
        return None


def _pairs(text: str) -> Iterator[tuple[str, int]]:
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        yield key, int(value)
