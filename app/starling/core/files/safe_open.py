"""The folders that outputs go to, opened step by step from their top: below it no link is followed.

The top is the runs folder, or the project that the user named outside it (`name_top`); links in its own path are
followed, since people keep their runs on another disk. A path below no top was named by the user as it is: links in
its folder are followed too, and only the file itself is never a link.
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
"""Of a file that is read whole: settings, a worker's status, a tracker's cursor."""

_named: list[Path] = []
_settled: dict[Path, Path] = {}
"""Top as it is named -> where it was when this process first used it: a link that is moved later moves no run."""


def runs_root(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the shared runs folder: `$STARLING_RUNS`, else `runs` below the current directory."""
    return Path(environment.get("STARLING_RUNS") or "runs").absolute()


def name_top(folder: Path) -> None:
    """Follow no link below `folder` from now on, unless it lies below a top, where none is followed anyway.

    A folder that holds the user's home is no top: what else is in the home is the user's own to link.
    """
    folder = folder.absolute()
    holds_home = Path(os.path.expanduser("~")).is_relative_to(folder)
    if not holds_home and folder not in _named and top_of(folder) == (folder, ()):
        _named.append(folder)


def top_of(path: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the top that `path` lies below, and the names that lead from there to it; the path itself below none."""
    path = path.absolute()
    for top in (runs_root(), *sorted(_named, key=lambda named: -len(named.parts))):
        for place in dict.fromkeys((top, _real(top))):
            if path.is_relative_to(place):
                names = Path(os.path.normpath(path.relative_to(place))).parts
                if ".." not in names:
                    return place, names
    return path, ()


def _real(top: Path) -> Path:
    """Return where a top lies, resolved once; the top itself while there is nothing."""
    if top not in _settled and os.path.isdir(top):
        _settled[top] = Path(os.path.realpath(top))
    return _settled.get(top, top)


def is_below_top(path: Path) -> bool:
    """Return whether links on the way to `path` are refused."""
    return bool(top_of(path)[1])


def open_folder(path: Path, *, create: bool = False) -> Folder:
    """Open a folder for outputs, made where `create` says so. Raises LinkRefused for a link below its top."""
    top, names = top_of(path)
    with Folder.resolve(_settled.get(top, top), create=create) as folder:
        folder.path = top
        return folder.folder(*names, create=create)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, where they are missing."""
    open_folder(path, create=True).close()


def open_file(path: Path, flags: int, mode: int = 0o644, *, alone: bool = False) -> int:
    """Open a regular file and return its descriptor; never through a link, and never waiting for a pipe's other end.

    With `alone`, for a file that is appended to or cut: it must have no other name, by which it may be somebody
    else's. Raises OSError: FileRefused for what is no such file.
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
    if flags & os.O_TRUNC:  # not at once: it may have been another's
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
    """Return whether an error in opening has another reason than the kind of file: links have an error of their own."""
    return stat.S_ISREG(state.st_mode) or stat.S_ISLNK(state.st_mode) or stat.S_ISDIR(state.st_mode)


def read_file(path: Path) -> bytes:
    """Return the content of a small regular file of ours; raises OSError, FileRefused for what is none."""
    with open(open_file(path, os.O_RDONLY), "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise FileRefused(path, f"holds more than {MOST_BYTES >> 20} MiB, and is none of ours")
    return content


def state_of(path: Path) -> os.stat_result | None:
    """Return what is at `path`, a link itself; None where there is nothing. Raises LinkRefused for a link on the way."""
    try:
        with open_folder(path.parent) as folder:
            return folder.stat(path.name)
    except FileNotFoundError:
        return None


def is_file(path: Path) -> bool:
    """Return whether `path` is a regular file, and no link to one. Raises LinkRefused for a link on the way."""
    state = state_of(path)
    return state is not None and stat.S_ISREG(state.st_mode)


def names_in(path: Path) -> list[str]:
    """Return the names of a folder's entries, sorted; none where there is no folder. Raises LinkRefused."""
    try:
        with open_folder(path) as folder:
            return folder.names()
    except FileNotFoundError:
        return []


def remove(path: Path) -> None:
    """Remove a file, or a link itself; nothing there is fine."""
    with contextlib.suppress(FileNotFoundError), open_folder(path.parent) as folder, _named_whole(path):
        os.unlink(path.name, dir_fd=folder.descriptor)


def remove_tree(path: Path) -> None:
    """Remove a folder and all below it, as far as that can be; a link, and what is mounted, is left alone."""
    with contextlib.suppress(FileNotFoundError), open_folder(path.parent) as folder:
        folder.remove(path.name)


@contextlib.contextmanager
def _named_whole(path: Path) -> Iterator[None]:
    """Name the whole path in an error of a system call that was given a descriptor and the last part of the path."""
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None


def rename(path: Path, target: Path) -> None:
    """Give a file another name, replacing what has it."""
    with open_folder(path.parent) as here, open_folder(target.parent) as there, _named_whole(target):
        os.replace(path.name, target.name, src_dir_fd=here.descriptor, dst_dir_fd=there.descriptor)
