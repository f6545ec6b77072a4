"""The one door to disk: a file is either its old content or its new content, never a part of it."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

TEMPORARY_SUFFIX = ".part"
_BEGINNING = 80
"""Bytes of a file's name that its temporary name repeats."""
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


def write_atomic(
    path: Path, payload: bytes | str | Callable[[IO[bytes]], None], *, previous: Path | None = None
) -> None:
    """Replace `path` by `payload`: written to a temporary name beside it, fsynced, renamed.

    `payload` is the content, or a function that writes it to an open binary file. `previous`, in the same folder,
    gets what `path` was. On any error the old file is untouched and the temporary one is removed; the error
    (OSError, or the payload's own) passes on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            if callable(payload):
                payload(file)
            else:
                file.write(payload.encode() if isinstance(payload, str) else payload)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _link_over(path, previous)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, of the same suffix, to a library that opens files by itself.

    Renamed to `path` at the end, after a sync; removed on any error, and the old file is untouched then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{_beginning(path.stem)}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def sweep(directory: Path) -> None:
    """Remove what killed writers left in `directory`; to be called by whoever alone writes there."""
    for leftover in directory.glob(f".*{TEMPORARY_SUFFIX}"):
        leftover.unlink(missing_ok=True)


def _temporary_name(path: Path) -> Path:
    # A random name: on a shared volume two containers may have the same process id.
    return path.with_name(f".{_beginning(path.name)}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")


def _beginning(name: str) -> str:
    """Return so much of a file's name that a temporary name, some 50 bytes longer, is not too long where it fits."""
    content = os.fsencode(name)
    return name if len(content) <= _BEGINNING else content[:_BEGINNING].decode("utf-8", "ignore")


def _link_over(path: Path, other: Path) -> None:
    """Make `other` a second name of the file at `path`, which keeps its own: neither is ever missing."""
    temporary = _temporary_name(other)
    try:
        os.link(path, temporary)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(path, temporary)  # a file system without hard links
    try:
        os.replace(temporary, other)
    finally:
        # Renaming a name of a file over another name of the same file does nothing, by POSIX.
        temporary.unlink(missing_ok=True)


def fsync_directory(directory: Path) -> None:
    """Make a rename in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
"""Not through a link, which may lead to a file of somebody else."""


def append_line(path: Path, line: str) -> None:
    """Append one line in a single write, so that concurrent readers see whole lines only.

    Raises OSError where the disk takes less than the whole line.
    """
    content = line.rstrip("\n").encode("utf-8", "surrogateescape") + b"\n"  # a file name may be no text
    descriptor = os.open(path, _APPEND, 0o644)
    try:
        if os.write(descriptor, content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)
