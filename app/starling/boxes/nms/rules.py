"""The thresholds of suppression."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_CANDIDATES = 30_000
"""The most candidates of one image in suppression; the most confident are used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """The thresholds of one call; see `non_max_suppression`."""

    conf: float
    iou: float
    classes: tuple[int, ...] | None
    """The classes to keep; None: all."""
    agnostic: bool
    multi_label: bool
    limit: int
    """The most boxes kept per image."""


def below(limit: float) -> float:
    """Return the largest float32 up to `limit`: every float32 is above both or above neither."""
    nearest = np.float32(limit)
    return float(nearest if float(nearest) <= limit else np.nextafter(nearest, np.float32(-np.inf)))
