"""What a reader may use on bytes that nobody vouches for: time, memory and counts, and one way to say what ran out.

A budget is for one unit that a stranger may have made: an image, a label file, one header of an archive. Long honest
work (an archive of 50 GB, a million label files) has no total limit; `Pace` ends it only where the work stands still.
"""

from __future__ import annotations

import time
from collections.abc import Callable

SECONDS = 20.0
"""The longest that one unit may take; real ones take less than a second, and a user still waits for 20."""
MEMORY_BYTES = 1 << 30
"""The most memory that one unit may take above the idle process; a replica of 2 GiB survives it."""
PACE_SECONDS = 60.0
"""The time over which a transfer must bring bytes; longer than a proxy or a busy disk stays silent."""
PACE_BYTES_PER_S = 1
"""The slowest transfer that counts as alive; a server that sends less holds the reader on purpose or by a fault."""


class BudgetExceeded(Exception):
    """Bytes that nobody vouches for wanted more than a reader gives; the message says more of what than how much."""


class Budget:
    """What one untrusted unit may still use: seconds, and the most of each thing that the reader names and counts.

    `Budget(bytes=64 << 20, rows=100_000)` allows 64 MiB and 100,000 rows within SECONDS. Names that end in `bytes`
    are shown in MiB. A reader calls `spend` before it builds what it spends on.
    """

    def __init__(
        self, *, seconds: float = SECONDS, clock: Callable[[], float] = time.monotonic, **limits: int
    ) -> None:
        self._seconds, self._clock, self._limits = seconds, clock, limits
        self._ends = clock() + seconds
        self._spent = dict.fromkeys(limits, 0)

    def spend(self, **amounts: int) -> None:
        """Count what is used now, and look at the clock. Raises BudgetExceeded for the first thing that ran out."""
        for name, amount in amounts.items():
            self._spent[name] += amount
            if self._spent[name] > self._limits[name]:
                raise BudgetExceeded(f"more than {_shown(name, self._limits[name])}")
        self.check_time()

    def check_time(self) -> None:
        """Raise BudgetExceeded where the seconds are over."""
        if self._clock() > self._ends:
            raise BudgetExceeded(f"more than {self._seconds:g} s")


class Pace:
    """Ends a transfer that stands still: PACE_SECONDS without a byte, or fewer than PACE_BYTES_PER_S in that time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._bytes = 0

    def step(self, count: int) -> None:
        """Count bytes that came. Raises BudgetExceeded where the last PACE_SECONDS brought too few."""
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
