"""Limits of time, memory and counts for reading untrusted data, with a common message for an exceeded limit.

A budget is for one untrusted unit: an image, a label file, one header of an archive. Long legitimate work (an archive
of 50 GB, a million label files) has no total limit; `Pace` ends it only if it makes no progress.
"""

from __future__ import annotations

import time
from collections.abc import Callable

SECONDS = 20.0
"""The time limit for one unit; real units take less than a second, and a user still waits for 20."""
MEMORY_BYTES = 1 << 30
"""The memory limit for one unit, on top of the idle process; a replica of 2 GiB survives it."""
PACE_SECONDS = 60.0
"""The period in which a transfer must bring bytes; longer than the pauses of a proxy or a busy disk."""
PACE_BYTES_PER_S = 1
"""The slowest acceptable transfer; a slower server is faulty, or delays the reader on purpose."""


class BudgetExceeded(Exception):
    """Untrusted data exceeds a limit; the message names the limit: `more than 64 MiB`."""


class Budget:
    """The remaining budget of one untrusted unit: seconds, and a limit for each quantity that the reader counts.

    `Budget(bytes=64 << 20, rows=100_000)` allows 64 MiB and 100,000 rows within SECONDS. Names that end in `bytes`
    are shown in MiB. A reader calls `spend` before it allocates.
    """

    def __init__(
        self, *, seconds: float = SECONDS, clock: Callable[[], float] = time.monotonic, **limits: int
    ) -> None:
        self._seconds, self._clock, self._limits = seconds, clock, limits
        self._ends = clock() + seconds
        self._spent = dict.fromkeys(limits, 0)

    def spend(self, **amounts: int) -> None:
        """Count `amounts` and check the time; raises BudgetExceeded for the first exceeded limit."""
        for name, amount in amounts.items():
            self._spent[name] += amount
            if self._spent[name] > self._limits[name]:
                raise BudgetExceeded(f"more than {_shown(name, self._limits[name])}")
        self.check_time()

    def check_time(self) -> None:
        """Raise BudgetExceeded if the time is over."""
        if self._clock() > self._ends:
            raise BudgetExceeded(f"more than {self._seconds:g} s")


class Pace:
    """Ends a stalled transfer: one that brings fewer than PACE_BYTES_PER_S over PACE_SECONDS."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._bytes = 0

    def step(self, count: int) -> None:
        """Count received bytes; raises BudgetExceeded if the last PACE_SECONDS brought too few."""
        self._bytes += count
        passed = self._clock() - self._since
        if passed < PACE_SECONDS:
            return
        if self._bytes < passed * PACE_BYTES_PER_S:
            raise BudgetExceeded(
                f"only {self._bytes} bytes in {passed:.0f} s, under {PACE_BYTES_PER_S} byte a second"
            )
        self._since, self._bytes = self._clock(), 0


def _shown(name: str, limit: int) -> str:
    if not name.endswith("bytes"):
        return f"{limit:,} {name.replace('_', ' ')}"
    of = name.removesuffix("bytes").rstrip("_").replace("_", " ")
    return f"{limit / (1 << 20):g} MiB{f' of {of}' if of else ''}"
