"""One trainer a run directory: a lock that dies with its holder."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from app.errors import UsageError, refusal
from app.outputs.folders import make_folder, open_file

LOCK = ".lock"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the run directory; raises UsageError naming the holder when another trainer has it.

    The kernel releases the lock when its holder dies, so there is nothing to clean up.
    """
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
    """Open the lock's file, which is about to be emptied: a link, or a second name of another file, is refused."""
    try:
        make_folder(path.parent)
        return open(open_file(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, alone=True), "a+")
    except OSError as error:
        raise refusal(error, path) or UsageError(
            f"{path}: cannot be locked ({error.strerror}); it must be a file that this user may write"
        ) from None
