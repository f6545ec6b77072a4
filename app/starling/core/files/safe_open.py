"""Open the folders of outputs part by part from their top folder; below the top no link is followed.

The top is the runs folder, or a project that the user named outside it (`name_top`). Links in the top's own path are
followed, because users keep runs on other disks. The user named a path outside every top: links in its folder are
followed too, but the file itself must not be a link.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from starling.core.files.folder import Folder
from starling.core.files.refusals import FileRefused

MOST_BYTES = 16 << 20
"""The limit for a file that is read whole: settings, a worker's status, a tracker's cursor."""

_named: list[Path] = []
_settled: dict[Path, Path] = {}
"""Top as named -> its real path at the first use in this process: a link that changes later moves no run."""


def runs_root(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the shared runs folder: `$STARLING_RUNS`, else `runs` below the current directory."""
    return Path(environment.get("STARLING_RUNS") or "runs").absolute()


def name_top(folder: Path) -> None:
    """Make `folder` a top, below which no link is followed, unless it is already below a top.

    A folder that contains the user's home becomes no top: users may have links in their home.
    """
    folder = folder.absolute()
    holds_home = Path(os.path.expanduser("~")).is_relative_to(folder)
    if not holds_home and folder not in _named and top_of(folder) == (folder, ()):
        _named.append(folder)


def top_of(path: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the top of `path` and the names from the top to `path`; `path` itself and no names if it has no top."""
    path = path.absolute()
    for top in (runs_root(), *sorted(_named, key=lambda named: -len(named.parts))):
        for place in dict.fromkeys((top, _real(top))):
            if path.is_relative_to(place):
                names = Path(os.path.normpath(path.relative_to(place))).parts
                if ".." not in names:
                    return place, names
    return path, ()


def _real(top: Path) -> Path:
    """Return the real path of a top, resolved once; the top itself while it does not exist."""
    if top not in _settled and os.path.isdir(top):
        _settled[top] = Path(os.path.realpath(top))
    return _settled.get(top, top)


def is_below_top(path: Path) -> bool:
    """Return whether links on the way to `path` are refused."""
    return bool(top_of(path)[1])


def open_folder(path: Path, *, create: bool = False) -> Folder:
    """Open a folder for outputs, and make it with `create`; raises LinkRefused for a link below its top."""
    top, names = top_of(path)
    with Folder.resolve(_settled.get(top, top), create=create) as folder:
        folder.path = top
        return folder.folder(*names, create=create)


def make_folder(path: Path) -> None:
    """Make a folder and the folders above it, if missing."""
    open_folder(path, create=True).close()


def open_file(path: Path, flags: int, mode: int = 0o644, *, alone: bool = False) -> int:
    """Open a regular file and return its descriptor; follows no link, and does not block on a pipe.

    `alone` is for a file to append to or truncate: it must have no other hard link, because it may then belong to
    another user. Raises OSError, or FileRefused for any other kind of file.
    """
    with open_folder(path.parent) as folder:
        try:
            descriptor = folder.open(path.name, flags & ~os.O_TRUNC | os.O_NONBLOCK, mode)
        except OSError as error:
            if folder.has(path.name) and not _is_followed_or_plain(folder.stat(path.name)):
                raise FileRefused(path, "is not a regular file") from None
            raise error from None
    try:
        _check(path, os.fstat(descriptor), alone=alone)
    except FileRefused:
        os.close(descriptor)
        raise
    if flags & os.O_TRUNC:  # only after the check: the file may have been another user's
        os.ftruncate(descriptor, 0)
    return descriptor


def _check(path: Path, state: os.stat_result, *, alone: bool) -> None:
    if not stat.S_ISREG(state.st_mode):
        raise FileRefused(path, "is not a regular file")
    if alone and state.st_nlink > 1:
        raise FileRefused(
            path,
            f"is one file under {state.st_nlink} names (hard links), and a change would reach the others",
            f"give it a file of its own: cp -p {path} {path}.own && mv {path}.own {path}",
        )


def _is_followed_or_plain(state: os.stat_result) -> bool:
    """Return whether an error of `open` has a reason other than the kind of file; links raise LinkRefused."""
    return stat.S_ISREG(state.st_mode) or stat.S_ISLNK(state.st_mode) or stat.S_ISDIR(state.st_mode)


def read_file(path: Path) -> bytes:
    """Return the content of a small regular file of ours; raises OSError, or FileRefused for any other file."""
    with open(open_file(path, os.O_RDONLY), "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise FileRefused(path, f"holds more than {MOST_BYTES >> 20} MiB, so it is not a file of ours")
    return content


def state_of(path: Path) -> os.stat_result | None:
    """Return the state of `path` (of a link itself); None without one. Raises LinkRefused for a linked folder."""
    try:
        with open_folder(path.parent) as folder:
            return folder.stat(path.name)
    except FileNotFoundError:
        return None


def is_file(path: Path) -> bool:
    """Return whether `path` is a regular file, not a link; raises LinkRefused for a linked folder on the path."""
    state = state_of(path)
    return state is not None and stat.S_ISREG(state.st_mode)


def names_in(path: Path) -> list[str]:
    """Return the names of a folder's entries, sorted; empty if there is no folder. Raises LinkRefused."""
    try:
        with open_folder(path) as folder:
            return folder.names()
    except FileNotFoundError:
        return []


def remove(path: Path) -> None:
    """Remove a file, or a link itself; no error if it does not exist."""
    with contextlib.suppress(FileNotFoundError), open_folder(path.parent) as folder, _named_whole(path):
        os.unlink(path.name, dir_fd=folder.descriptor)


def remove_tree(path: Path) -> None:
    """Remove a folder and its contents as far as possible; a link and mounted folders stay."""
    with contextlib.suppress(FileNotFoundError), open_folder(path.parent) as folder:
        folder.remove(path.name)


@contextlib.contextmanager
def _named_whole(path: Path) -> Iterator[None]:
    """Put the whole path into an error of a system call that got a descriptor and the last part of the path."""
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None


def rename(path: Path, target: Path) -> None:
    """Rename a file, replacing an existing `target`."""
    with open_folder(path.parent) as here, open_folder(target.parent) as there, _named_whole(target):
        os.replace(path.name, target.name, src_dir_fd=here.descriptor, dst_dir_fd=there.descriptor)
