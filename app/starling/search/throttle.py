"""What is done now and then, and takes a while, kept within a share of a worker's time."""

from __future__ import annotations

import time


class Throttle:
    """Says when something may be done again, by how long it took."""

    def __init__(self, share: float) -> None:
        """`share` is the part of the time that it may take, 0 to 1."""
        self._share = share
        self._next = 0.0

    def is_due(self) -> bool:
        """Return whether enough time has passed."""
        return time.monotonic() >= self._next

    def took(self, seconds: float) -> None:
        """Note that it was done just now, in so many seconds."""
        self._next = time.monotonic() + seconds / self._share
