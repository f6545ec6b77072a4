"""Limit the memory of one local replica: by a cgroup if one can be made, else by watching its processes.

The supervisor loads this module by path, so it imports only the standard library and the ground floor. A resource
limit (`ulimit`) cannot limit a replica: it counts each process alone, and it counts address space that torch and CUDA
reserve and never touch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from starling.core.cgroups import MOUNT, OWN, count_oom_kills, groups_of
from starling.core.process import all_stats

CGROUPS = str(MOUNT)
LOOK_S = 0.25
"""Seconds between two looks at a replica without a cgroup; in between, the replica can exceed the limit."""


class MemoryLimit:
    """A limit of `limit` bytes for the processes of the session that this process leads; 0: no limit.

    As in a container, exceeding the limit kills one process, not all, and sets `oom_killed`.
    """

    def __init__(self, name: str, limit: int, root: str = CGROUPS) -> None:
        self._limit = limit
        self._cgroup = make_cgroup(name, limit, root) if limit else None
        self._looked = 0.0
        self._killed = 0

    @property
    def kept_by(self) -> str:
        """`cgroup`, `watch` or `nobody`."""
        return "cgroup" if self._cgroup else "watch" if self._limit else "nobody"

    @property
    def oom_killed(self) -> bool:
        """Whether a process was killed for lack of memory."""
        return self._killed + (count_oom_kills(Path(self._cgroup)) or 0 if self._cgroup else 0) > 0

    def enter(self) -> None:
        """Put the calling process and its future children under the limit; called between fork and exec."""
        if self._cgroup:
            _write(os.path.join(self._cgroup, "cgroup.procs"), "0")

    def look(self) -> None:
        """Kill the largest process if all processes together exceed the limit; does nothing if a cgroup enforces it."""
        now = time.monotonic()
        if self._cgroup or not self._limit or now < self._looked + LOOK_S:
            return
        self._looked = now
        sizes = {pid: memory_of(pid) for pid in session_of(os.getpid())}
        if sum(sizes.values()) > self._limit:
            largest = max(sizes, key=lambda pid: sizes[pid])
            with contextlib.suppress(ProcessLookupError):
                os.kill(largest, signal.SIGKILL)
                self._killed += 1

    def close(self) -> None:
        """Kill the processes that the replica left running, as the end of a container does, and remove its cgroup."""
        for pid in session_of(os.getpid()):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if self._cgroup:
            remove_cgroup(self._cgroup)


def make_cgroup(name: str, limit: int, root: str = CGROUPS) -> str | None:
    """Return a new cgroup with the limit, below every limit of this process; None if no such cgroup can be made."""
    for parent, limits in _places(root):
        path = os.path.join(parent, name)
        with contextlib.suppress(OSError):
            os.mkdir(path)
            try:
                for file, value in limits.items():
                    if file.endswith("max") or os.path.exists(os.path.join(path, file)):
                        _write(os.path.join(path, file), value.format(limit))
                if _can_enter(path):
                    return path
            except OSError:
                pass
            remove_cgroup(path)
    return None


def _places(root: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the folders in which a cgroup may be made, with the files and values that set its limit."""
    for group in groups_of(_own_cgroups(), "memory", Path(root)):
        own = str(group.folder)
        if group.version == 1:
            yield own, {"memory.limit_in_bytes": "{}", "memory.memsw.limit_in_bytes": "{}"}
            continue
        # A cgroup with processes cannot limit its children, so the new cgroup is a sibling. A sibling escapes the
        # limit of this process's own cgroup, and is therefore made only if that cgroup has no limit.
        mounted = os.path.exists(os.path.join(root, "cgroup.controllers"))
        if mounted and _read(os.path.join(own, "memory.max")) in ("max", ""):
            parent = own if group.folder == group.base else os.path.dirname(own)
            if "memory" in _read(os.path.join(parent, "cgroup.subtree_control")).split():
                yield parent, {"memory.max": "{}", "memory.swap.max": "0"}


def _own_cgroups() -> str:
    return _read(str(OWN))


def _can_enter(cgroup: str) -> bool:
    """Return whether a child of this process may join; the kernel may allow making a cgroup but not entering it."""
    pid = os.fork()
    if pid == 0:
        try:
            _write(os.path.join(cgroup, "cgroup.procs"), "0")
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def remove_cgroup(cgroup: str, limit_s: float = 2.0) -> None:
    """Kill the processes in a cgroup and remove it; no error if the cgroup is already gone."""
    deadline = time.monotonic() + limit_s
    while os.path.isdir(cgroup) and time.monotonic() < deadline:
        for pid in map(int, _read(os.path.join(cgroup, "cgroup.procs")).split()):
            if (
                pid > 0
            ):  # 0 is a process outside this pid namespace; kill(2) with 0 would hit this process's group
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.rmdir(cgroup)
            return
        time.sleep(0.01)


def find_cgroup(name: str, root: str = CGROUPS) -> str | None:
    """Return the cgroup of this name that a killed supervisor has left behind, from anywhere below `root`."""
    for hierarchy in (os.path.join(root, "memory"), root):
        for folder, folders, _ in os.walk(hierarchy):
            if name in folders:
                return os.path.join(folder, name)
    return None


def session_of(leader: int) -> list[int]:
    """Return the processes of `leader`'s session and its descendants outside the session, without `leader`."""
    parents: dict[int, int] = {}
    found = set()
    for pid, stat in all_stats():
        parents[pid] = stat.parent
        if stat.session == leader and not stat.ended:
            found.add(pid)
    grown = True
    while grown:
        before = len(found)
        found.update(pid for pid, parent in parents.items() if parent == leader or parent in found)
        grown = len(found) > before
    return sorted(found - {leader})


def memory_of(pid: int) -> int:
    """Return the process's anonymous, shared and swapped bytes; pages of files do not count."""
    total = 0
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith(("RssAnon:", "RssShmem:", "VmSwap:")):
            total += int(line.split()[1]) * 1024
    return total


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def _write(path: str, value: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(value)
