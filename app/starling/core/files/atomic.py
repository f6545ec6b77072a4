"""The one door to disk: a file is either its old content or its new content, never a part of it."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from starling.core.files.folder import Folder
from starling.core.files.refusals import disk_write
from starling.core.files.safe_open import open_file, open_folder

TEMPORARY_SUFFIX = ".part"
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL
_BEGINNING = 80
"""Bytes of a file's name that its temporary name repeats."""
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


def write_atomic(
    path: Path, payload: bytes | str | Callable[[IO[bytes]], None], *, previous: Path | None = None
) -> None:
    """Replace `path` by `payload`: written to a temporary name beside it, fsynced, renamed.

    `payload` is the content, or a function that writes it to an open binary file. `previous`, in the same folder,
    gets what `path` was. On any error the old file is untouched and the temporary one is removed; the error
    (OSError, DiskRefused of a full disk, LinkRefused of a folder that is a link, or the payload's own) passes on.
    """
    with open_folder(path.parent, create=True) as folder, disk_write(path):
        temporary = _temporary_name(path.name)
        try:
            with open(folder.open(temporary, _NEW), "wb") as file:
                if callable(payload):
                    payload(file)
                else:
                    file.write(payload.encode() if isinstance(payload, str) else payload)
                file.flush()
                os.fsync(file.fileno())
            if previous is not None and _is_file(folder, path.name):
                _link_over(folder, path.name, previous.name)
            _rename(folder, temporary, path.name)
        except BaseException:
            _remove(folder, temporary)
            raise
        os.fsync(folder.descriptor)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path in the folder of `path`, of the same suffix, to a library that opens files by itself.

    Renamed to `path` at the end, after a sync; removed on any error, and the old file is untouched then.
    """
    with open_folder(path.parent, create=True) as folder, disk_write(path):
        temporary = f".{_beginning(path.stem)}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}{path.suffix}"
        try:
            yield folder.proc_path / temporary
            descriptor = folder.open(temporary, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            _rename(folder, temporary, path.name)
        except BaseException:
            _remove(folder, temporary)
            raise
        os.fsync(folder.descriptor)


def sweep(directory: Path) -> None:
    """Remove what killed writers left in `directory`, if it is there; to be called by whoever alone writes there."""
    with suppress(FileNotFoundError, NotADirectoryError), open_folder(directory) as folder:
        for name in folder.names():
            # The names of write_atomic end so; in those of atomic_path the file's own suffix follows.
            if name.startswith(".") and (name.endswith(TEMPORARY_SUFFIX) or f"{TEMPORARY_SUFFIX}." in name):
                _remove(folder, name)


def _temporary_name(name: str) -> str:
    # A random name: on a shared volume two containers may have the same process id.
    return f".{_beginning(name)}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"


def _beginning(name: str) -> str:
    """Return so much of a file's name that a temporary name, some 50 bytes longer, is not too long where it fits."""
    content = os.fsencode(name)
    return name if len(content) <= _BEGINNING else content[:_BEGINNING].decode("utf-8", "ignore")


def _is_file(folder: Folder, name: str) -> bool:
    """Return whether there is a file of that name, and no link."""
    return folder.has(name) and stat.S_ISREG(folder.stat(name).st_mode)


def _rename(folder: Folder, name: str, other: str) -> None:
    try:
        os.replace(name, other, src_dir_fd=folder.descriptor, dst_dir_fd=folder.descriptor)
    except OSError as error:
        if error.errno is None:
            raise
        # By the file's own name: nobody knows the temporary one.
        raise type(error)(error.errno, error.strerror, str(folder.path / other)) from None


def _remove(folder: Folder, name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder.descriptor)


def _link_over(folder: Folder, name: str, other: str) -> None:
    """Make `other` a second name of the file `name`, which keeps its own: neither is ever missing."""
    temporary, here = _temporary_name(other), folder.descriptor
    try:
        os.link(name, temporary, src_dir_fd=here, dst_dir_fd=here, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _copy(folder, name, temporary)  # a file system without hard links
    try:
        _rename(folder, temporary, other)
    finally:
        # Renaming a name of a file over another name of the same file does nothing, by POSIX.
        _remove(folder, temporary)


def _copy(folder: Folder, name: str, other: str) -> None:
    with (
        open(folder.open(name, os.O_RDONLY | os.O_NONBLOCK), "rb") as source,
        open(folder.open(other, _NEW), "wb") as target,
    ):
        shutil.copyfileobj(source, target)


def fsync_directory(directory: Path) -> None:
    """Make a rename in `directory` durable."""
    with open_folder(directory) as folder:
        os.fsync(folder.descriptor)


def append_line(path: Path, line: str) -> None:
    """Append one line in a single write, so that concurrent readers see whole lines only.

    Raises OSError: DiskRefused where the disk takes less than the whole line, LinkRefused and FileRefused for a link
    and for what may be a file of somebody else.
    """
    content = line.rstrip("\n").encode("utf-8", "surrogateescape") + b"\n"  # a file name may be no text
    with disk_write(path):
        descriptor = open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, alone=True)
        try:
            if os.write(descriptor, content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        finally:
            os.close(descriptor)
