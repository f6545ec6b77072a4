"""Look at who may read the data of a training and write its runs folder: by owner, mode and access control list."""

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
"""A sample: permissions rarely differ from file to file, and a dataset may hold a million."""
IMAGES_AND_LABELS = IMAGE_SUFFIXES | {".txt"}


@dataclass(frozen=True, slots=True)
class PathState:
    """Who may do what with a path of this machine."""

    path: Path
    uid: int
    gid: int
    mode: int
    has_list: bool = False
    """Whether an access control list is set on it, which mode and owner do not tell."""
    leads_to: Path | None = None
    """Where it leads, for a link to a folder."""

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder, links followed."""
        return stat.S_ISDIR(self.mode)


@dataclass(frozen=True, slots=True)
class ReadPath:
    """A file or a folder that a training opens."""

    error: type[StarlingError]
    """The error that the lack of it is."""
    root: Path
    """The mount through which replicas see it."""
    states: tuple[PathState, ...]
    """The way from the mount, the path itself, and some of what is in it."""


def state_of(path: Path) -> PathState | None:
    """Return the state of a path, links followed; None for one that is gone, or a link to nowhere."""
    try:
        found = path.stat()
        is_link = stat.S_ISDIR(found.st_mode) and path.is_symlink()
        leads_to = Path(os.path.abspath(path.parent / os.readlink(path))) if is_link else None
    except OSError:
        return None
    return PathState(path, found.st_uid, found.st_gid, found.st_mode, _has_list(path), leads_to)


def look_at_reads(reads: Mapping[Path, type[StarlingError]], shown: Sequence[Path]) -> tuple[ReadPath, ...]:
    """Return the states of what a training opens; `shown` is mounted.

    Docker itself follows the path to what it mounts, so only what is mounted counts, not the folders above it.
    """
    found = []
    for path, error in reads.items():
        found.append(_look_at(path, error, shown))
        labels = _label_folder(path)
        if labels is not None and os.path.isdir(labels):
            found.append(_look_at(labels, error, shown))
    return tuple(found)


def look_at_runs(runs: Path, fleet: str) -> tuple[PathState, ...]:
    """Return the states of the runs folder and of the fleet's own folders in it, as far as they are there."""
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
    """Yield some folders, images and labels in a folder; nothing for a file, or a folder that cannot be listed."""
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
    """Return where the labels of a folder of images are: `labels` in place of the last `images`."""
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
