"""Describe a process of this machine: its user, its command, its containers and its ancestors."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starling.core.process import stat_of
from starling.core.redaction import masked
from starling.core.words import printable

PROC = Path("/proc")
MOST_ANCESTORS = 64
_LONGEST_COMMAND = 80
_CONTAINER = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


@dataclass(frozen=True, slots=True)
class Process:
    """What `/proc` shows every user about a process."""

    pid: int
    user: str
    command: str
    """The command line, shortened, with passwords in URLs hidden."""
    containers: tuple[str, ...]
    """Ids of the containers that the process runs in, outermost first; empty on the host itself."""
    ancestors: tuple[int, ...]
    """The pids of the parent, the parent's parent, and so on."""


def find_process(pid: int, proc: Path = PROC) -> Process | None:
    """Return a process; None if it has ended, or if another pid namespace hides it."""
    folder = proc / str(pid)
    uid = user_id(folder)
    if uid is None:
        return None
    return Process(
        pid=pid,
        user=user_name(uid),
        command=_command(folder),
        containers=_containers(folder),
        ancestors=_ancestors(pid, proc),
    )


def caller_ids(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return the caller's uid and gid: under `sudo`, those of the user who called `sudo`."""
    uid, gid = os.getuid(), os.getgid()
    sudo_uid, sudo_gid = environment.get("SUDO_UID", ""), environment.get("SUDO_GID", "")
    if uid == 0 and sudo_uid.isdigit() and sudo_gid.isdigit():
        return int(sudo_uid), int(sudo_gid)
    return uid, gid


def user_id(folder: Path) -> int | None:
    """Return the uid of a process, given its folder in `/proc`; None if the process has ended."""
    try:
        # Root owns the folder itself if the process has changed its user.
        status = (folder / "status").read_text(errors="replace")
        return int(status.split("\nUid:", 1)[1].split(maxsplit=1)[0])
    except (OSError, IndexError, ValueError):
        return None


def user_name(uid: int) -> str:
    """Return a user's name, or `uid 1234` if the user has no name."""
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return f"uid {uid}"


def command_words(folder: Path) -> tuple[str, ...]:
    """Return the words of a process's command line; empty if the process has ended."""
    try:
        raw = (folder / "cmdline").read_bytes()
    except OSError:
        return ()
    return tuple(os.fsdecode(word) for word in raw.split(b"\0")[:-1])


def _command(folder: Path) -> str:
    text = printable(" ".join(masked(word) for word in command_words(folder)) or "a kernel thread")
    return text if len(text) <= _LONGEST_COMMAND else text[: _LONGEST_COMMAND - 1] + "…"


def _containers(folder: Path) -> tuple[str, ...]:
    """Return the container ids in a process's cgroup paths.

    Docker writes `/docker/ID` (cgroupfs) or `docker-ID.scope` (systemd), Podman `libpod-ID.scope`, Kubernetes
    `cri-containerd-ID.scope`; cgroup v1 has one line per controller, v2 one line. A nested container has both ids.
    """
    try:
        lines = (folder / "cgroup").read_text(errors="replace").splitlines()
    except OSError:
        return ()
    return tuple(dict.fromkeys(found for line in lines for found in _CONTAINER.findall(line)))


def _ancestors(pid: int, proc: Path) -> tuple[int, ...]:
    ancestors: list[int] = []
    while pid > 1 and len(ancestors) < MOST_ANCESTORS:
        stat = stat_of(pid, proc)
        if stat is None:
            break
        pid = stat.parent
        ancestors.append(pid)
    return tuple(ancestors)
