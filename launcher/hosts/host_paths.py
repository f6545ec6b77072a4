"""Folders of the host that are the system's: no replica may be shown one, or write there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath

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


def is_the_systems(places: Iterable[PurePath], home: PurePath) -> bool:
    """Return whether a folder, given by its name and by where links lead, is the system's or a whole home."""
    never = {*_NEVER_EXACTLY, str(home), _ALLOWED_ALL_THE_SAME}
    for place in places:
        below = any(place.is_relative_to(item) for item in _NEVER_BELOW)
        if str(place) in never or (below and not place.is_relative_to(_ALLOWED_ALL_THE_SAME)):
            return True
    return False
