"""The locks of the project: the kernel's, on files and folders; they end with their holder.

Who gets one has the file that its path names, even where somebody removed it meanwhile: a `flock` belongs to an open
file, not to a name. Whoever waits for the lock of a file that is removed, and then gets it, would share it with nobody:
others make a new file of that name and lock that one.
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
"""So often is a lock begun anew whose file has gone; more is a volume that cannot tell files apart."""
_NO_LOCKS = frozenset({errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})

Open = Callable[[], int]
Take = Callable[[int], bool]


def try_flock(descriptor: int, *, shared: bool = False) -> bool:
    """Take the lock of an open file if nobody else has it; return whether. A `shared` one goes with others of its kind."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_own(descriptor: int) -> None:
    """Lock a file that this process has just made. Raises OSError where its file system has no locks, or another was quicker."""
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
    """Try `take` until it has the lock, at most every `poll_s`; return whether it got it within `limit_s` (None: no limit).

    Who waits for longer than `patience_s` hears of it by `tell`: once, or again after each `again_s`.
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

    `open_folder` returns a new descriptor of the folder. Returns a descriptor, and whether the lock was got. On a volume
    that locks no folders (NFS) it counts as got: there the file is the only lock.
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
    """Hold what `take` takes while the block runs; yields whether the lock was got."""
    descriptor, got = take(path, open_file, acquire)
    try:
        yield got
    finally:
        os.close(descriptor)
