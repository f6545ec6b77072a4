"""A lock among processes, and among containers that share a volume on one host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from starling.core.files.safe_open import make_folder, open_file
from starling.core.lock import POLL_S, held, try_flock, wait_for


@contextmanager
def exclusive(path: Path, timeout_s: float, *, poll_s: float = POLL_S) -> Iterator[None]:
    """Hold the lock file `path` inside the block; the kernel releases the lock of a dead holder.

    Raises TimeoutError if another process still holds the lock after `timeout_s` seconds (a frozen one may hold it for
    ever), and OSError if the file cannot be created.
    """
    make_folder(path.parent)

    def acquire(descriptor: int) -> bool:
        return wait_for(lambda: try_flock(descriptor), limit_s=timeout_s, poll_s=poll_s)

    with held(path, lambda: _open(path), acquire) as got:
        if not got:
            raise TimeoutError(f"{path} is held by another process")
        yield


def _open(path: Path) -> int:
    return open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, alone=True)
