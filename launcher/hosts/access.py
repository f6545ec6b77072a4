"""Read who may use the data and the runs folder of a training: owner, mode and access control list of each path."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath

from starling.core.errors import StarlingError
from starling.core.files.kinds import IMAGE_SUFFIXES, is_hidden, suffix_of

MOST_OF_A_FOLDER = 20
"""The size of a sample: permissions rarely differ between files, and a dataset may hold a million files."""
IMAGES_AND_LABELS = IMAGE_SUFFIXES | {".txt"}


@dataclass(frozen=True, slots=True)
class PathState:
    """Owner, mode and links of a path of this machine."""

    path: Path
    uid: int
    gid: int
    mode: int
    has_list: bool = False
    """Whether the path has an access control list, which owner and mode do not show."""
    leads_to: Path | None = None
    """The target, if the path is a link to a folder."""

    @property
    def is_folder(self) -> bool:
        """Whether the path is a folder, links followed."""
        return stat.S_ISDIR(self.mode)


@dataclass(frozen=True, slots=True)
class ReadPath:
    """A file or a folder that a training opens."""

    error: type[StarlingError]
    """The error to raise if the path is missing."""
    root: Path
    """The mount through which replicas see the path."""
    states: tuple[PathState, ...]
    """The folders from the mount to the path, the path, and a sample of its contents."""


def state_of(path: Path) -> PathState | None:
    """Return the state of a path, links followed; None if the path does not exist or is a dangling link."""
    try:
        found = path.stat()
        is_link = stat.S_ISDIR(found.st_mode) and path.is_symlink()
        leads_to = Path(os.path.abspath(path.parent / os.readlink(path))) if is_link else None
    except OSError:
        return None
    return PathState(path, found.st_uid, found.st_gid, found.st_mode, _has_list(path), leads_to)


def look_at_reads(reads: Mapping[Path, type[StarlingError]], shown: Sequence[Path]) -> tuple[ReadPath, ...]:
    """Return the states of the paths that a training opens; the paths in `shown` are mounted.

    Docker resolves the path to a mount as root, so the permissions of the folders above the mount do not matter.
    """
    found = []
    for path, error in reads.items():
        found.append(_look_at(path, error, shown))
        labels = _label_folder(path)
        if labels is not None and os.path.isdir(labels):
            found.append(_look_at(labels, error, shown))
    return tuple(found)


def look_at_runs(runs: Path, fleet: str) -> tuple[PathState, ...]:
    """Return the states of the runs folder and of the fleet's folders in it, as far as they exist."""
    below = PurePath(fleet).parts
    folders = (runs, runs / ".workers", *(runs.joinpath(*below[:n]) for n in range(1, len(below) + 1)))
    return tuple(state for path in folders if os.path.isdir(path) and (state := state_of(path)))


def _look_at(path: Path, error: type[StarlingError], shown: Sequence[Path]) -> ReadPath:
    root = next((item for item in shown if path.is_relative_to(item)), path)
    parts = path.relative_to(root).parts
    way = (root.joinpath(*parts[:depth]) for depth in range(len(parts)))
    states = (state_of(item) for item in (*way, path, *_sample(path)))
    return ReadPath(error, root, tuple(state for state in states if state is not None))


def _sample(path: Path) -> Iterator[Path]:
    """Yield a sample of the folders, images and labels in a folder; nothing for a file or an unreadable folder."""
    try:
        with os.scandir(path) as entries:
            wanted = (
                Path(entry.path)
                for entry in entries
                if not is_hidden(entry.name)
                and (suffix_of(entry.name) in IMAGES_AND_LABELS or entry.is_dir())
            )
            yield from islice(wanted, MOST_OF_A_FOLDER)
    except OSError:
        return


def _label_folder(path: Path) -> Path | None:
    """Return the folder of labels for a folder of images: `labels` replaces the last `images` in the path."""
    parts = list(path.parts)
    if "images" not in parts:
        return None
    parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts)


def _has_list(path: Path) -> bool:
    try:
        return bool(os.getxattr(path, "system.posix_acl_access"))
    except OSError:
        return False
