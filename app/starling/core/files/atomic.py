"""Write files atomically: a file has either its old or its new content, never a part."""

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
"""The number of bytes of a file's name in its temporary name."""
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


def write_atomic(
    path: Path, payload: bytes | str | Callable[[IO[bytes]], None], *, previous: Path | None = None
) -> None:
    """Replace `path` with `payload`: write a temporary file beside it, fsync, rename.

    `payload` is the content, or a function that writes it to an open binary file. `previous`, in the same folder,
    becomes the old file of `path`. On any error the old file is unchanged, the temporary file is removed, and the
    error is raised again: OSError, DiskRefused for a full disk, LinkRefused for a linked folder, or the payload's own.
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
    """Yield a temporary path in the folder of `path`, with the same suffix, for a library that opens files itself.

    At the end the temporary file is synced and renamed to `path`; on any error it is removed, and the old file is
    unchanged.
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
    """Remove temporary files of killed writers from `directory`, if it exists; only its single writer may call this."""
    with suppress(FileNotFoundError, NotADirectoryError), open_folder(directory) as folder:
        for name in folder.names():
            # Names of write_atomic end with the suffix; in names of atomic_path the file's own suffix follows.
            if name.startswith(".") and (name.endswith(TEMPORARY_SUFFIX) or f"{TEMPORARY_SUFFIX}." in name):
                _remove(folder, name)


def _temporary_name(name: str) -> str:
    # A random name: on a shared volume two containers may have the same process id.
    return f".{_beginning(name)}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"


def _beginning(name: str) -> str:
    """Return the beginning of a file's name, short enough for a temporary name that is some 50 bytes longer."""
    content = os.fsencode(name)
    return name if len(content) <= _BEGINNING else content[:_BEGINNING].decode("utf-8", "ignore")


def _is_file(folder: Folder, name: str) -> bool:
    """Return whether `name` is a regular file, not a link."""
    return folder.has(name) and stat.S_ISREG(folder.stat(name).st_mode)


def _rename(folder: Folder, name: str, other: str) -> None:
    try:
        os.replace(name, other, src_dir_fd=folder.descriptor, dst_dir_fd=folder.descriptor)
    except OSError as error:
        if error.errno is None:
            raise
        # Name the final file in the error, because the user does not know the temporary name.
        raise type(error)(error.errno, error.strerror, str(folder.path / other)) from None


def _remove(folder: Folder, name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder.descriptor)


def _link_over(folder: Folder, name: str, other: str) -> None:
    """Make `other` a second name of the file `name`: neither name is ever missing."""
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
        # POSIX: a rename between two names of the same file does nothing and leaves both.
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
    """Append one line in a single write: concurrent readers see whole lines only.

    Raises OSError: DiskRefused if the disk does not take the whole line, LinkRefused for a link, FileRefused for a
    file that may belong to another user.
    """
    content = line.rstrip("\n").encode("utf-8", "surrogateescape") + b"\n"  # a file name may not be text
    with disk_write(path):
        descriptor = open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, alone=True)
        try:
            if os.write(descriptor, content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        finally:
            os.close(descriptor)
