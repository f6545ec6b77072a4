"""Files that somebody else named: opened only if they are regular files, and read only up to a limit.

A path out of a list, a description or a shared folder may lead to a device that never ends, to a FIFO that nobody
writes, or to no possible file at all. Every function here raises OSError for such a path, and nothing else.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import IO

from starling.core.budget import BudgetExceeded

_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
"""O_NONBLOCK: the opening of a FIFO does not wait for its writer."""
_NO_SUCH_NAME = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EBADF, errno.EINVAL}
)


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a regular file for reading. Raises OSError with the path for anything else, a NUL in the name included."""
    descriptor = _open(path)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise OSError(errno.EINVAL, "is not a regular file", os.fspath(path))


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return the bytes of a regular file. Raises OSError as open_regular, BudgetExceeded for over `limit` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # A file may grow while it is read, and files of /proc have no size: the limit counts, not what stat says.
        content = file.read(min(size, limit) + 1)
        if size <= limit and len(content) > size:
            content += file.read(limit + 1 - len(content))
    if len(content) > limit:
        raise BudgetExceeded(f"more than {limit / (1 << 20):g} MiB")
    return content


def found(path: str | os.PathLike[str]) -> os.stat_result | None:
    """Return what is at `path`, links followed; None where nothing is, or nothing can be by that name.

    Raises OSError where it cannot be known: a folder that may not be looked into, a disk that fails.
    """
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in _NO_SUCH_NAME:
            return None
        raise
    except ValueError:  # a NUL, or a character that no file name has
        return None


def exists(path: str | os.PathLike[str]) -> bool:
    """Return whether anything is at `path`, as `found` sees it."""
    return found(path) is not None


def is_file(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a regular file, as `found` sees it."""
    state = found(path)
    return state is not None and stat.S_ISREG(state.st_mode)


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a folder, as `found` sees it."""
    state = found(path)
    return state is not None and stat.S_ISDIR(state.st_mode)


def _open(path: str | os.PathLike[str]) -> int:
    try:
        return os.open(path, _FLAGS)
    except ValueError as error:  # a NUL, or a character that no file name has
        raise OSError(errno.EINVAL, f"is no possible name of a file ({error})", os.fspath(path)) from None
