"""Random numbers: one stream per image and one per decision of an epoch, each a function of (seed, epoch, index)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

_LAST = 0xFFFF_FFFF
_DECISIONS = {
    "order": _LAST,
    "images": _LAST - 1,
    "batches": _LAST - 2,
    "quad": _LAST - 3,
    "scale": _LAST - 4,
}
"""Index of the stream of each decision, larger than the number of images of any dataset."""


def random_stream(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return one stream: Philox (Salmon et al., SC 2011) keyed by seed, epoch and index."""
    key = np.array((seed & 0xFFFF_FFFF_FFFF_FFFF, (epoch & 0xFFFF_FFFF) << 32 | index), np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def image_stream(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the random numbers of one item of an epoch."""
    return random_stream(seed, epoch, index % (_LAST - len(_DECISIONS)))


def decision_stream(
    seed: int, epoch: int, decision: Literal["order", "images", "batches", "quad", "scale"]
) -> np.random.Generator:
    """Return the random numbers of a decision that an epoch takes once for all its images."""
    return random_stream(seed, epoch, _DECISIONS[decision])


def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray[Any, Any]:
    """Return the order of an epoch: a permutation of range(length), int64."""
    return decision_stream(seed, epoch, "order").permutation(length)
