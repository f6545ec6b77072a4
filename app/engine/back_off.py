"""Go on when a batch does not fit into memory: the same batch in parts, whose gradients add up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from app.data.loader import Batch


def split(batch: Batch, parts: int) -> Iterator[Batch]:
    """Yield the batch in at most `parts` parts of near equal size, targets numbered anew in each."""
    size = math.ceil(len(batch.indices) / parts)
    for first in range(0, len(batch.indices), size):
        rows = (batch.targets[:, 0] >= first) & (batch.targets[:, 0] < first + size)
        targets = batch.targets[rows]
        targets[:, 0] -= first
        yield replace(
            batch,
            images=batch.images[first : first + size],
            targets=targets,
            indices=batch.indices[first : first + size],
            original_hw=batch.original_hw[first : first + size],
        )
