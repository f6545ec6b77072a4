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
"""Folders that must not be mounted at the same path: they would hide the image's files or expose the whole host."""

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
"""Folders without datasets or results below them; the engines' sockets and stores are there."""

_ALLOWED = "/dev/shm"
"""A file system in memory, which some users keep data in."""


class HostFiles(Files, Protocol):
    """Checks of paths before a replica gets them."""

    @property
    def remote(self) -> bool:
        """Whether the files are on another machine."""

    @property
    def home(self) -> Path:
        """The user's home folder on that machine."""

    @property
    def start(self) -> Path:
        """The folder that relative paths start at."""

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
    """The free space of a disk."""

    bytes: int
    files: int | None = None
    """The number of files that can still be made; None if the file system has no limit or does not report it."""


def disk_space(path: Path) -> DiskSpace:
    """Return the free space of the disk of a path, which need not exist yet; raises OSError."""
    disk = os.statvfs(next((parent for parent in (path, *path.parents) if parent.exists()), Path("/")))
    return DiskSpace(disk.f_bavail * disk.f_frsize, disk.f_favail if disk.f_files else None)


def read_below(path: Path, most_bytes: int) -> bytes:
    """Return the head of `<top>/<folder>/<file>` without following links below `<top>`; empty if not a plain file."""
    try:
        with Folder.resolve(path.parent.parent) as top, top.folder(path.parent.name) as folder:
            return read_plain(folder, path.name, most_bytes)
    except (OSError, ValueError):
        return b""


def read_plain(folder: Folder, file: str, most_bytes: int) -> bytes:
    """Return the head of a regular file of a folder; empty for a link, a pipe or a device.

    Raises OSError, or ValueError for an invalid file name.
    """
    if not stat.S_ISREG(folder.stat(file).st_mode):
        return b""  # opening a device may have side effects
    with os.fdopen(folder.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as opened:
        return opened.read(most_bytes) if stat.S_ISREG(os.fstat(opened.fileno()).st_mode) else b""


def is_the_systems(places: Iterable[PurePath], home: PurePath) -> bool:
    """Return whether a folder belongs to the system or is a whole home folder; replicas must not use such a folder.

    `places` are the folder's path and its resolved path.
    """
    never = {*_NEVER_EXACTLY, str(home), _ALLOWED}
    for place in places:
        below = any(place.is_relative_to(item) for item in _NEVER_BELOW)
        if str(place) in never or (below and not place.is_relative_to(_ALLOWED)):
            return True
    return False
