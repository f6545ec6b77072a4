"""The files of the machine that replicas run on."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Protocol

from starling.core.dataset import Files, OwnFiles
from starling.core.files.folder import Folder
from starling.core.files.regular import is_file, open_regular

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

_ALLOWED = "/dev/shm"
"""Memory as a disk, which some keep data in."""


class HostFiles(Files, Protocol):
    """Questions about paths, asked before a replica is given them."""

    @property
    def remote(self) -> bool:
        """Whether they are those of another machine."""

    @property
    def home(self) -> Path:
        """The user's home folder there."""

    @property
    def start(self) -> Path:
        """Where relative paths start."""

    def is_file(self, path: Path) -> bool:
        """Return whether the path is a file that the user may read; links are followed."""

    def real(self, path: Path) -> Path:
        """Return the path with every link followed."""

    def read(self, path: Path, most_bytes: int) -> bytes:
        """Return the head of a file; raises OSError."""


class LocalFiles(OwnFiles):
    """Files of this machine."""

    remote = False

    @property
    def home(self) -> Path:
        """The user's home folder."""
        return Path.home()

    @property
    def start(self) -> Path:
        """The working directory."""
        return Path.cwd()

    def is_file(self, path: Path) -> bool:
        """Return whether the path is a file."""
        return is_file(path)

    def exists(self, path: Path) -> bool:
        """Return whether the path is a folder or a file."""
        return self.is_dir(path) or is_file(path)

    def real(self, path: Path) -> Path:
        """Return the path with every link followed."""
        return Path(os.path.realpath(path))

    def read(self, path: Path, most_bytes: int) -> bytes:
        """Return the head of a file; raises OSError."""
        with open_regular(path) as file:
            return file.read(most_bytes)


LOCAL = LocalFiles()


@dataclass(frozen=True, slots=True)
class DiskSpace:
    """What a disk still takes."""

    bytes: int
    files: int | None = None
    """None where the file system has no such bound, or does not tell."""


def disk_space(path: Path) -> DiskSpace:
    """Return the free space of the disk that a path is on, or would be; raises OSError."""
    disk = os.statvfs(next((parent for parent in (path, *path.parents) if parent.exists()), Path("/")))
    return DiskSpace(disk.f_bavail * disk.f_frsize, disk.f_favail if disk.f_files else None)


def read_below(path: Path, most_bytes: int) -> bytes:
    """Return the head of `<top>/<folder>/<file>`, following no link below `<top>`; empty for what is no plain file."""
    try:
        with Folder.resolve(path.parent.parent) as top, top.folder(path.parent.name) as folder:
            return read_plain(folder, path.name, most_bytes)
    except (OSError, ValueError):
        return b""


def read_plain(folder: Folder, file: str, most_bytes: int) -> bytes:
    """Return the head of a regular file of a folder; empty for a link, a pipe or a device.

    Raises OSError, and ValueError for what is no name of a file.
    """
    if not stat.S_ISREG(folder.stat(file).st_mode):
        return b""  # a device would not be opened without effect
    with os.fdopen(folder.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as opened:
        return opened.read(most_bytes) if stat.S_ISREG(os.fstat(opened.fileno()).st_mode) else b""


def is_the_systems(places: Iterable[PurePath], home: PurePath) -> bool:
    """Return whether a folder is the system's or a whole home: no replica may see it or write there.

    `places` are its path, and the path that links lead to.
    """
    never = {*_NEVER_EXACTLY, str(home), _ALLOWED}
    for place in places:
        below = any(place.is_relative_to(item) for item in _NEVER_BELOW)
        if str(place) in never or (below and not place.is_relative_to(_ALLOWED)):
            return True
    return False
