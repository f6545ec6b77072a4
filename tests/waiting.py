"""Wait for something that another thread or process brings about."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 90.0
"""Longer than anything takes that a test waits for, however busy the machine is."""


def wait_until(condition: Callable[[], object], limit_s: float = PATIENCE_S) -> None:
    """Return once a condition holds; fails where it does not within the limit."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"did not happen within {limit_s:g} s"
        time.sleep(0.02)
