"""The one door to disk: a file is either its old content or its new content, never a part of it."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

TEMPORARY_SUFFIX = ".part"


def write_atomic(path: Path, payload: bytes | str | Callable[[IO[bytes]], None]) -> None:
    """Replace `path` by `payload`: written to a temporary name beside it, fsynced, renamed.

    `payload` is the content, or a function that writes it to an open binary file. On any error the old
    file is untouched and the temporary one is removed; the error (OSError, or the payload's own) passes on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A random name: on a shared volume two containers may have the same process id.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "wb") as file:
            if callable(payload):
                payload(file)
            else:
                file.write(payload.encode() if isinstance(payload, str) else payload)
            file.flush()
            os.fsync(file.fileno())
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
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def fsync_directory(directory: Path) -> None:
    """Make a rename in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, line: str) -> None:
    """Append one line in a single write, so that concurrent readers see whole lines only.

    Raises OSError where the disk takes less than the whole line.
    """
    content = line.rstrip("\n").encode() + b"\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(descriptor, content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)
