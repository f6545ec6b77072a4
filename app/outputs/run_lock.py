"""One trainer a run directory: a lock that dies with its holder."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from app.errors import UsageError

LOCK = ".lock"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the run directory; raises UsageError naming the holder when another trainer has it.

    The kernel releases the lock when its holder dies, so there is nothing to clean up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _open(folder / LOCK) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UsageError(
                f"{folder}: already in use by {holder}; wait for it, stop it, or choose another --name"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _open(path: Path) -> IO[str]:
    """Open the lock's file, but not through a link: it is about to be emptied."""
    try:
        return open(
            os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644), "a+"
        )
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be locked ({error.strerror}); it must be a file that this user may write"
        ) from None
