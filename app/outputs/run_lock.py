"""One trainer a run directory: a lock that dies with its holder."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from app.core.lock import take, take_folder
from app.errors import UsageError

LOCK = ".lock"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the run directory; raises UsageError naming the holder when another trainer has it.

    The kernel releases the lock when its holder dies, so there is nothing to clean up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        # Two locks: the file tells who holds it, the folder's holds though somebody removes the file.
        descriptor, free = take(folder / LOCK, lambda: _open(folder / LOCK))
        file = stack.enter_context(open(descriptor, "a+"))
        if free:
            descriptor, free = take_folder(folder)
            stack.callback(os.close, descriptor)
        if not free:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UsageError(
                f"{folder}: already in use by {holder}; wait for it, stop it, or choose another --name"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _open(path: Path) -> int:
    """Open the lock's file, but not through a link: it is about to be emptied."""
    try:
        return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be locked ({error.strerror}); it must be a file that this user may write"
        ) from None
