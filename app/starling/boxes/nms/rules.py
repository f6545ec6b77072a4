"""What counts as a candidate, and which of them stay."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_CANDIDATES = 30_000
"""Boxes of one image that reach suppression, the most confident first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """One call's thresholds; see `non_max_suppression`."""

    conf: float
    iou: float
    classes: tuple[int, ...] | None
    """The only classes wanted; None: all."""
    agnostic: bool
    multi_label: bool
    limit: int
    """Boxes that stay of one image at most."""


def below(limit: float) -> float:
    """Return the largest float32 up to `limit`: a float32 is above both or above none."""
    nearest = np.float32(limit)
    return float(nearest if float(nearest) <= limit else np.nextafter(nearest, np.float32(-np.inf)))
