"""One trainer a run directory: a lock that dies with its holder."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from starling.core.errors import UsageError
from starling.core.files.refusals import disk_write, refusal
from starling.core.files.safe_open import make_folder, open_file, open_folder
from starling.core.lock import take, take_folder

LOCK = ".lock"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the run directory; raises UsageError naming the holder when another trainer has it.

    The kernel releases the lock when its holder dies, so there is nothing to clean up.
    """
    with ExitStack() as stack:
        # Two locks: the file tells who holds it, the folder's holds though somebody removes the file.
        descriptor, free = take(folder / LOCK, lambda: _open(folder / LOCK))
        file = stack.enter_context(open(descriptor, "a+"))
        if free:
            descriptor, free = take_folder(lambda: open_folder(folder).descriptor)
            stack.callback(os.close, descriptor)
        if not free:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UsageError(
                f"{folder}: already in use by {holder}; wait for it, stop it, or choose another --name"
            )
        with disk_write(
            folder / LOCK
        ):  # by the descriptor: what a buffer holds would be tried again at the close
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def _open(path: Path) -> int:
    """Open the lock's file, which is about to be emptied: a link, or a second name of another file, is refused."""
    try:
        make_folder(path.parent)
        return open_file(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, alone=True)
    except OSError as error:
        raise refusal(error, path) or UsageError(
            f"{path}: cannot be locked ({error.strerror}); it must be a file that this user may write"
        ) from None
