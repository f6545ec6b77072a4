"""A lock among processes, and among containers that share a volume on one host."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from starling.core.lock import take, try_flock
from starling.outputs.folders import make_folder, open_file


@contextmanager
def exclusive(path: Path, timeout_s: float, *, poll_s: float = 0.05) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; the kernel lets go of a dead holder's.

    Raises TimeoutError when another process still holds it after `timeout_s` seconds (a frozen one may for
    ever), and OSError when the file cannot be made.
    """
    make_folder(path.parent)
    deadline = time.monotonic() + timeout_s

    def acquire(descriptor: int) -> bool:
        while not try_flock(descriptor):
            if time.monotonic() >= deadline:
                return False
            time.sleep(poll_s)
        return True

    descriptor, free = take(path, lambda: _open(path), acquire)
    try:
        if not free:
            raise TimeoutError(f"{path} is held by another process")
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    return open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, alone=True)
