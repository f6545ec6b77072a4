"""One `up` at a time on this machine, for all users and all runs folders.

The kernel holds the lock on an empty file that all users share. The lock ends with its holder, so a leftover file has
no effect. Nobody writes the file, so any user may own it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from launcher.errors import EngineError
from launcher.hosts.processes import PROC, find_process
from starling.core.lock import take, try_flock, wait_for

logger = logging.getLogger(__name__)

NAME = "starling-launcher.lock"
FOLDERS = (Path("/run/lock"), Path("/dev/shm"), Path("/tmp"))
"""Candidates; the lock is in the first folder where every user can make files and only a file's owner can remove it."""

LOCK_WAIT_S, POLL_S = 120.0, 0.1

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class HostLock:
    """A held lock, which can be released before its block ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """Release the lock once the new replicas exist: the next `up` can then see them."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@contextlib.contextmanager
def host_lock(*, folders: Sequence[Path] = FOLDERS, wait_s: float = LOCK_WAIT_S) -> Iterator[HostLock]:
    """Hold this machine against every other `up`; raises EngineError naming the holder after too long a wait."""
    path = lock_path(folders)
    descriptor, _ = take(path, lambda: _open(path), lambda opened: _acquire(opened, path, wait_s))
    lock = HostLock(descriptor)
    try:
        yield lock
    finally:
        lock.release()


def lock_path(folders: Sequence[Path] = FOLDERS) -> Path:
    """Return the path of the lock's file, the same for every user of the machine."""
    for folder in folders:
        with contextlib.suppress(OSError):
            found = folder.lstat()
            # World-writable and sticky. A /tmp that is a link, or a user's private folder, may differ between users.
            if stat.S_ISDIR(found.st_mode) and found.st_mode & 0o1002 == 0o1002:
                return folder / NAME
    raise EngineError(
        f"no shared folder for the lock of `launcher up`: of {', '.join(map(str, folders))} none is writable for all "
        "and sticky; restore /tmp: sudo chmod 1777 /tmp"
    )


def _open(path: Path) -> int:
    """Open the file, or create it; raises EngineError if something else has its path."""
    for _ in range(50):
        # O_CREAT is for a new file only: Linux refuses it for another user's existing file in a sticky folder.
        try:
            descriptor = os.open(path, _OPEN)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                descriptor = os.open(path, _OPEN | os.O_CREAT | os.O_EXCL, 0o444)
                os.fchmod(descriptor, 0o444)  # whatever the umask
                return descriptor
            continue
        except PermissionError:
            time.sleep(0.02)  # its creator is about to make it readable for all
            continue
        except OSError as error:
            raise _in_the_way(path, "a link" if error.errno == errno.ELOOP else str(error.strerror)) from None
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        raise _in_the_way(path, "not a file")
    raise _in_the_way(path, "not readable for you")


def _in_the_way(path: Path, what: str) -> EngineError:
    return EngineError(
        f"{path}: {what}, and the lock of `launcher up` belongs there; remove it: sudo rm {path}"
    )


def _acquire(descriptor: int, path: Path, wait_s: float) -> bool:
    def wait() -> str:
        return f"waiting for {_holder(descriptor)[0]}: one `launcher up` at a time on this machine"

    def give_up() -> str:
        holder, pid = _holder(descriptor)
        end = f"end it: kill {pid}" if pid else f"see who has it: sudo fuser -v {path}"
        return f"{holder} has held {path} for over {wait_s:g} s; wait for it, or {end}"

    wait_for_lock(lambda: try_flock(descriptor), wait=wait, give_up=give_up, limit_s=wait_s)
    return True


def _holder(descriptor: int, proc: Path = PROC) -> tuple[str, int]:
    """Return the holder of the lock, in words and by pid; pid 0 if the kernel does not report it."""
    found = os.fstat(descriptor)
    wanted = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with contextlib.suppress(OSError):
        for line in (proc / "locks").read_text().splitlines():
            fields = line.split()  # 1: FLOCK ADVISORY WRITE 4242 00:19:1234 0 EOF
            if len(fields) > 5 and "->" not in fields and fields[1] == "FLOCK" and fields[5] == wanted:
                pid = int(fields[4])
                process = find_process(pid, proc) if pid > 0 else None
                if process:
                    return f"{process.user}'s process {pid} ({process.command})", pid
    return "another `launcher up`", 0


def wait_for_lock(
    take: Callable[[], bool],
    *,
    wait: Callable[[], str],
    give_up: Callable[[], str],
    limit_s: float = LOCK_WAIT_S,
    poll_s: float = POLL_S,
) -> None:
    """Return once `take` has the lock; logs the words of `wait` the first time that it has not.

    Raises EngineError with the message of `give_up` after `limit_s`.
    """
    if not wait_for(take, limit_s=limit_s, tell=lambda: logger.info(wait()), poll_s=poll_s):
        raise EngineError(give_up())
