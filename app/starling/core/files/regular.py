"""Open files with untrusted names only if they are regular files, and read them only up to a limit.

A path from a list, a description or a shared folder may lead to an endless device or to a FIFO without a writer, or
may be no valid path. Every function here raises only OSError for such a path.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import IO

from starling.core.budget import BudgetExceeded

_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
"""O_NONBLOCK: opening a FIFO does not wait for a writer."""
_NO_SUCH_NAME = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EBADF, errno.EINVAL}
)


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a regular file for reading; raises OSError with the path for anything else, also for a NUL in the name."""
    descriptor = _open(path)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise OSError(errno.EINVAL, "is not a regular file", os.fspath(path))


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return the bytes of a regular file; raises OSError like open_regular, BudgetExceeded for over `limit` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # A file may grow during the read, and files of /proc have no size: check the limit, not the size in stat.
        content = file.read(min(size, limit) + 1)
        if size <= limit and len(content) > size:
            content += file.read(limit + 1 - len(content))
    if len(content) > limit:
        raise BudgetExceeded(f"more than {limit / (1 << 20):g} MiB")
    return content


def found(path: str | os.PathLike[str]) -> os.stat_result | None:
    """Return the state of `path`, links followed; None if it does not exist, or is no valid path.

    Raises OSError if the state cannot be read: the folder is not accessible, or the disk fails.
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
    """Return whether `path` exists; raises OSError like `found`."""
    return found(path) is not None


def is_file(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a regular file, links followed; raises OSError like `found`."""
    state = found(path)
    return state is not None and stat.S_ISREG(state.st_mode)


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a folder, links followed; raises OSError like `found`."""
    state = found(path)
    return state is not None and stat.S_ISDIR(state.st_mode)


def _open(path: str | os.PathLike[str]) -> int:
    try:
        return os.open(path, _FLAGS)
    except ValueError as error:  # a NUL, or a character that no file name has
        raise OSError(errno.EINVAL, f"is no possible name of a file ({error})", os.fspath(path)) from None
