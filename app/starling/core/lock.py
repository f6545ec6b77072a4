"""Locks of the kernel on files: who gets one has the file that its path names, even where somebody removed it meanwhile.

A `flock` belongs to an open file, not to a name. Whoever waits for the lock of a file that is removed, and then gets
it, would share it with nobody: others make a new file of that name and lock that one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

_ROUNDS = 100
"""So often is a lock begun anew whose file has gone; more is a volume that cannot tell files apart."""

Open = Callable[[], int]
Take = Callable[[int], bool]


def try_flock(descriptor: int) -> bool:
    """Take the exclusive lock of an open file if nobody else has it; return whether."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Return whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def take(path: Path, open_file: Open, acquire: Take = try_flock) -> tuple[int, bool]:
    """Open the lock's file, lock it, and return the descriptor, and whether the lock was got.

    `open_file` returns a new descriptor of `path`; `acquire` locks one, or returns False where another process has
    it. The caller closes the descriptor, which ends the lock. Raises OSError where the file vanishes again and again.
    """
    for _ in range(_ROUNDS):
        descriptor = open_file()
        try:
            got = acquire(descriptor)
            if not got or is_at(descriptor, path):
                return descriptor, got
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the file was removed while this process waited, and others lock a new one
    raise OSError(errno.ESTALE, "its file is replaced again and again", str(path))


def take_folder(open_folder: Open, acquire: Take = try_flock) -> tuple[int, bool]:
    """Lock a folder itself, as a second lock beside a file in it which somebody might remove.

    `open_folder` returns a new descriptor of the folder. Returns a descriptor, and whether the lock was got. On a volume that locks no folders (NFS) it counts as got: there
    the file is the only lock.
    """
    descriptor = open_folder()
    try:
        return descriptor, acquire(descriptor)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            os.close(descriptor)
            raise
        return descriptor, True
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise
