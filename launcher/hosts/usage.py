"""The usage of replicas from the kernel: a container's from its control group, a local replica's from its session.

The kernel answers in microseconds; an engine takes a second.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from starling.core.cgroups import MOUNT, CGroup, groups_of
from starling.core.process import all_stats

PROC, ROOT = Path("/proc"), MOUNT


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """A replica's usage of the machine; a value that could not be read is None."""

    memory_bytes: int | None
    """Memory without cached files, which the kernel would drop first."""
    cpu_s: float | None
    """CPU seconds since the start, summed over all cores: two readings give a rate."""
    at: float
    """Monotonic seconds of the reading."""
    clock: float | None = None
    """Time of the reading by the other machine's clock, if known: a rate then excludes delays of the network."""


Read = Callable[[Path], str]
"""Returns a file's text; raises OSError."""


def read_usage(pid: int, name: str, proc: Path = PROC, root: Path = ROOT) -> Usage | None:
    """Return the memory and the CPU time of the control group that holds process `pid` of this machine.

    None unless the group's path contains `name`, the container's id: a pid from another machine or namespace is another
    process here.
    """
    try:
        groups = (proc / str(pid) / "cgroup").read_text()
    except OSError:
        return None
    return usage_in(groups, name, Path.read_text, root)


def usage_in(groups: str, name: str, read: Read, root: Path = ROOT) -> Usage | None:
    """Return the usage of the groups in a process's `cgroup` file whose paths contain `name`."""
    memory = cpu = None
    for group in _named(groups, name, "memory", root):
        if group.version == 1:
            memory = _without_cache(group.folder, "memory.usage_in_bytes", "total_inactive_file", read)
        elif memory is None:
            memory = _without_cache(group.folder, "memory.current", "inactive_file", read)
    for group in _named(groups, name, "cpuacct", root):
        if group.version == 1:
            cpu = _cpu_v1(group, read)
        elif cpu is None:
            cpu = _cpu_v2(group.folder, read)
    if memory is None and cpu is None:
        return None
    return Usage(memory_bytes=memory, cpu_s=cpu, at=time.monotonic())


def files_of(groups: str, name: str, root: Path = ROOT) -> list[Path]:
    """Return the files that `usage_in` may read, for a machine whose files are fetched in one request."""
    files: list[Path] = []
    for group in _named(groups, name, "memory", root):
        used = "memory.usage_in_bytes" if group.version == 1 else "memory.current"
        files += [group.folder / used, group.folder / "memory.stat"]
    for group in _named(groups, name, "cpuacct", root):
        files += _cpu_files_v1(group) if group.version == 1 else [group.folder / "cpu.stat"]
    return files


def read_sessions(sessions: Collection[int], proc: Path = PROC) -> dict[int, Usage]:
    """Return the resident memory and the CPU time of each session's processes, in one pass over all processes.

    Pages that several processes share count once for each process.
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


def _named(text: str, name: str, controller: str, root: Path) -> Iterator[CGroup]:
    """Yield a controller's groups whose paths contain `name`."""
    return (group for group in groups_of(text, controller, root) if name in str(group.folder))


def _without_cache(folder: Path, total: str, cache: str, read: Read) -> int | None:
    """Return the memory in use without cached files, which the kernel would drop first, as `docker stats` does."""
    try:
        used = int(read(folder / total))
        cached = dict(_pairs(read(folder / "memory.stat"))).get(cache, 0)
    except (OSError, ValueError):
        return None
    return max(used - cached, 0)


def _cpu_v1(group: CGroup, read: Read) -> float | None:
    for file in _cpu_files_v1(group):
        try:
            return int(read(file)) / 1e9
        except (OSError, ValueError):
            continue
    return None


def _cpu_files_v1(group: CGroup) -> list[Path]:
    """Return the possible paths of the file: some machines mount the hierarchy under all its controllers' names."""
    below = group.folder.relative_to(group.base)
    return [base / below / "cpuacct.usage" for base in (group.base, group.base.parent / group.controllers)]


def _cpu_v2(folder: Path, read: Read) -> float | None:
    try:
        return dict(_pairs(read(folder / "cpu.stat")))["usage_usec"] / 1e6
    except (OSError, ValueError, KeyError):
        return None


def _pairs(text: str) -> Iterator[tuple[str, int]]:
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        yield key, int(value)
