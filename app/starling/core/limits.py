"""What the container may use: memory and processors, from cgroup v1 or v2 and the scheduler."""

from __future__ import annotations

import math
import os
from pathlib import Path

_ROOT = Path("/")
_UNLIMITED = 1 << 60
"""Cgroup v1 writes a number near 2**63 where there is no limit."""


def container_memory_limit(root: Path = _ROOT) -> int:
    """Return the bytes this container may use: the smallest of its cgroup limit and the machine's memory."""
    limits = [_read_int(path) for path in _candidates(root, "memory", "memory.max", "memory.limit_in_bytes")]
    limits.append(_machine_memory(root))
    return min((limit for limit in limits if limit is not None and 0 < limit < _UNLIMITED), default=1 << 30)


def container_memory_used(root: Path = _ROOT) -> int:
    """Return the bytes charged to this container that are not files' pages, which give way; 0 if unknown."""
    for path in _candidates(root, "memory", "memory.current", "memory.usage_in_bytes"):
        used = _read_int(path)
        if used is not None:
            return max(used - _reclaimable(path.with_name("memory.stat")), 0)
    return 0


def container_cpu_count(root: Path = _ROOT) -> int:
    """Return how many processors this container may keep busy, at least 1: its quota and affinity."""
    counts = [len(os.sched_getaffinity(0))]
    for path in _candidates(root, "cpu", "cpu.max", "cpu.cfs_quota_us"):
        quota = _quota(path)
        if quota is not None:
            counts.append(max(math.ceil(quota), 1))
    return min(counts)


def _candidates(root: Path, controller: str, v2_name: str, v1_name: str) -> list[Path]:
    """Return the files that may hold a limit, from this process's own group up to the mounted root.

    Inside a container the mount point is its own group; outside, /proc/self/cgroup names the group.
    """
    mount = root / "sys/fs/cgroup"
    paths: list[Path] = []
    for line in _read_text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if not group.startswith("/") or ".." in group:
            continue
        if controllers == "":
            base, name = mount, v2_name
        elif controller in controllers.split(","):
            base, name = mount / controller, v1_name
        else:
            continue
        folder = base / group.lstrip("/")
        while folder != base and base in folder.parents:
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
    """Return the bytes of files, mapped ones too: a shared picture cache is charged to whoever touched it first."""
    values: dict[str, int] = {}
    for line in _read_text(stat).splitlines():
        name, _, number = line.partition(" ")
        if number.isdigit():
            values[name] = int(number)
    prefix = "total_" if "total_inactive_file" in values else ""  # cgroup v1: groups below included
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
