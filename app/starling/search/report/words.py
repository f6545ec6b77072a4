"""Figures as people read them."""

from __future__ import annotations

import math

from starling.progress import duration

__all__ = ["compact", "duration", "number", "percent"]


def number(value: float, digits: int = 4) -> str:
    """Return `value` with so many significant digits, without trailing zeros."""
    return f"{value:.{digits}g}" if math.isfinite(value) else str(value)


def compact(value: float) -> str:
    """Return a count as `950`, `12k`, `3.4M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def percent(share: float) -> str:
    """Return a share as `7.3 %`, `42 %`."""
    return f"{100 * share:.1f} %" if 0 < share < 0.0995 else f"{100 * share:.0f} %"
