"""Folders of the host that are the system's: no replica may be shown one, or write there."""

from __future__ import annotations

import os
from pathlib import Path, PurePath

_NEVER_EXACTLY = (
    "/",
    "/home",
    "/opt",
    "/root",
    "/tmp",
    "/usr",
    "/usr/local",
    "/usr/src",
    "/var",
    "/var/lib",
)
"""Mounted at their own path, these would hide the image's files or show a replica the whole host."""

_NEVER_BELOW = (
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/lib",
    "/lib64",
    "/proc",
    "/run",
    "/sbin",
    "/sys",
    "/usr/bin",
    "/usr/lib",
    "/usr/sbin",
    "/usr/src/app",
    "/var/lib/containerd",
    "/var/lib/containers",
    "/var/lib/docker",
    "/var/run",
)
"""Nothing below these is a dataset or a place for results; the engines' sockets and stores live there."""

_ALLOWED_ALL_THE_SAME = "/dev/shm"
"""Memory as a disk, which some keep data in."""


def is_the_systems(folder: Path) -> bool:
    """Return whether a folder is the system's, or the caller's whole home; links are followed."""
    never = {*_NEVER_EXACTLY, str(Path.home()), _ALLOWED_ALL_THE_SAME}
    for place in {os.path.abspath(folder), os.path.realpath(folder)}:
        below = any(PurePath(place).is_relative_to(item) for item in _NEVER_BELOW)
        if place in never or (below and not PurePath(place).is_relative_to(_ALLOWED_ALL_THE_SAME)):
            return True
    return False
