"""The project's locks: kernel locks (`flock`) on files and folders, which end with their holder.

A `flock` belongs to an open file, not to a name. If the file is removed while a process waits, the process would lock
a file without a name, while others lock a new file of that name. `take` therefore checks that the locked file still
has its path, and else starts again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

POLL_S = 0.05
_FIRST_PAUSE_S = 0.001
_ROUNDS = 100
"""The most attempts if the lock's file keeps disappearing; a volume that needs more cannot tell files apart."""
_NO_LOCKS = frozenset({errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})

Open = Callable[[], int]
Take = Callable[[int], bool]


def try_flock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock an open file if it is free, and return whether that worked; several processes can hold a `shared` lock."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_own(descriptor: int) -> None:
    """Lock a file that this process has just made; raises OSError without locks, or if another process was faster."""
    if not try_flock(descriptor):
        raise BlockingIOError(errno.EWOULDBLOCK, "another process has locked it")


def wait_for(
    take: Callable[[], bool],
    *,
    limit_s: float | None = None,
    tell: Callable[[], object] | None = None,
    patience_s: float = 0.0,
    again_s: float | None = None,
    poll_s: float = POLL_S,
) -> bool:
    """Try `take` at least every `poll_s` until it has the lock; return False after `limit_s` (None: no limit).

    After `patience_s`, calls `tell`: once, or again after each `again_s`.
    """
    began, pause = time.monotonic(), min(_FIRST_PAUSE_S, poll_s)
    tell_at: float | None = began + patience_s
    while not take():
        now = time.monotonic()
        if limit_s is not None and now - began >= limit_s:
            return False
        if tell is not None and tell_at is not None and now >= tell_at:
            tell()
            tell_at = None if again_s is None else now + again_s
        time.sleep(pause)
        pause = min(pause * 2, poll_s)
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Return whether the open file still has this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def take(path: Path, open_file: Open, acquire: Take = try_flock) -> tuple[int, bool]:
    """Open the lock's file, lock it, and return the descriptor and whether the lock was taken.

    `open_file` returns a new descriptor of `path`; `acquire` locks it, or returns False if another process has the
    lock. The caller closes the descriptor, which ends the lock. Raises OSError if the file keeps disappearing.
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
        os.close(descriptor)  # the file was removed during the wait, and others lock a new file
    raise OSError(errno.ESTALE, "its file is replaced again and again", str(path))


def take_folder(open_folder: Open, acquire: Take = try_flock) -> tuple[int, bool]:
    """Lock a folder itself, as a second lock in case a user removes the lock file in it.

    `open_folder` returns a new descriptor of the folder. Returns a descriptor and whether the lock was taken. On a
    volume that cannot lock folders (NFS) the lock counts as taken: there the file is the only lock.
    """
    descriptor = open_folder()
    try:
        return descriptor, acquire(descriptor)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
        return descriptor, True
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise


@contextlib.contextmanager
def held(path: Path, open_file: Open, acquire: Take = try_flock) -> Iterator[bool]:
    """Hold the lock of `take` during the block; yields whether the lock was taken."""
    descriptor, got = take(path, open_file, acquire)
    try:
        yield got
    finally:
        os.close(descriptor)
