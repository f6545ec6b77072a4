"""Control groups of version 1 and 2: the groups of a process, and the limits of the container."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MOUNT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
_ROOT = Path("/")
_UNLIMITED = 1 << 60
"""Values from here on mean no limit: cgroup v1 then writes a number near 2**63."""


class CGroup(NamedTuple):
    """A control group of a process, below the mount of its hierarchy."""

    version: int
    """1 or 2; version 2 has one hierarchy for all controllers."""
    base: Path
    """The root of the hierarchy."""
    folder: Path
    controllers: str
    """The controllers, separated by commas; empty in version 2."""


def groups_of(text: str, controller: str, mount: Path = MOUNT) -> Iterator[CGroup]:
    """Yield a controller's groups in a process's `cgroup` file, of version 1 and version 2.

    A path that leads out of the mount, as one from another namespace can, is left out.
    """
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not path.startswith("/") or ".." in path.split("/"):
            continue
        if not controllers:
            yield CGroup(2, mount, mount / path.lstrip("/"), controllers)
        elif controller in controllers.split(","):
            base = mount / controller
            yield CGroup(1, base, base / path.lstrip("/"), controllers)


def count_oom_kills(folder: Path) -> int | None:
    """Return the number of processes of a group that the kernel has killed for memory; None if unknown."""
    for name in ("memory.oom_control", "memory.events"):
        for line in _read_text(folder / name).splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill" and value.strip().isdigit():
                return int(value)
    return None


def own_oom_kills(own: Path = OWN, mount: Path = MOUNT) -> int:
    """Return the number of processes of this process's group that the kernel has killed for memory; 0 if unknown.

    In a container the group's files are at the mount's root, even if /proc names another path (version 1).
    """
    folders = [group.folder for group in groups_of(_read_text(own), "memory", mount)]
    counts = map(count_oom_kills, (*folders, mount / "memory", mount))
    return next((count for count in counts if count is not None), 0)


def container_memory_limit(root: Path = _ROOT) -> int:
    """Return the bytes that this container may use: the smallest of its cgroup limits and the machine's memory."""
    limits = [_read_int(path) for path in _candidates(root, "memory", "memory.max", "memory.limit_in_bytes")]
    limits.append(_machine_memory(root))
    return min((limit for limit in limits if limit is not None and 0 < limit < _UNLIMITED), default=1 << 30)


def container_memory_used(root: Path = _ROOT) -> int:
    """Return the bytes charged to this container without reclaimable pages of files; 0 if unknown."""
    for path in _candidates(root, "memory", "memory.current", "memory.usage_in_bytes"):
        used = _read_int(path)
        if used is not None:
            return max(used - _reclaimable(path.with_name("memory.stat")), 0)
    return 0


def container_cpu_count(root: Path = _ROOT) -> int:
    """Return the number of processors that this container may use, by quota and affinity; at least 1."""
    counts = [len(os.sched_getaffinity(0))]
    for path in _candidates(root, "cpu", "cpu.max", "cpu.cfs_quota_us"):
        quota = _quota(path)
        if quota is not None:
            counts.append(max(math.ceil(quota), 1))
    return min(counts)


def _candidates(root: Path, controller: str, v2_name: str, v1_name: str) -> list[Path]:
    """Return the files that may hold a limit, from this process's group up to the mounted root.

    Inside a container the mount point is the container's group; outside, /proc/self/cgroup names the group.
    """
    mount = root / "sys/fs/cgroup"
    paths: list[Path] = []
    for group in groups_of(_read_text(root / "proc/self/cgroup"), controller, mount):
        name, folder = v2_name if group.version == 2 else v1_name, group.folder
        while folder != group.base and group.base in folder.parents:
            paths.append(folder / name)
            folder = folder.parent
    paths += [mount / v2_name, mount / controller / v1_name]
    return [path for path in dict.fromkeys(paths) if path.is_file()]


def _quota(path: Path) -> float | None:
    if path.name == "cpu.max":
        quota_text, _, period_text = _read_text(path).strip().partition(" ")
    else:
        quota_text = _read_text(path).strip()
        period_text = _read_text(path.with_name("cpu.cfs_period_us")).strip()
    try:
        quota, period = int(quota_text), int(period_text)
    except ValueError:  # "max"
        return None
    return quota / period if quota > 0 and period > 0 else None


def _reclaimable(stat: Path) -> int:
    """Return the bytes of file pages, mapped ones included: a shared image cache is charged to its first reader."""
    values: dict[str, int] = {}
    for line in _read_text(stat).splitlines():
        name, _, number = line.partition(" ")
        if number.isdigit():
            values[name] = int(number)
    prefix = "total_" if "total_inactive_file" in values else ""  # cgroup v1: with the groups below
    return values.get(f"{prefix}inactive_file", 0) + values.get(f"{prefix}active_file", 0)


def _machine_memory(root: Path) -> int | None:
    for line in _read_text(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemTotal":
            return int(rest.split()[0]) * 1024
    return None


def _read_int(path: Path) -> int | None:
    try:
        return int(_read_text(path).strip())
    except ValueError:
        return None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
