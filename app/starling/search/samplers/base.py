"""What every sampler is: a pure function from a candidate's number and what is known to its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from starling.search.outcome import SearchFailed
from starling.search.samplers.history import History
from starling.search.space import Value, Values

REDRAWS = 1000
"""Draws of which one must be new."""


class Sampler(Protocol):
    """Propose candidates for one study.

    A proposal is a function of the study's seed, the candidate's number and what is known: workers that ask with
    different numbers share no random stream, whenever they start, and a worker that asks again gets the same.
    """

    def propose(self, number: int, known: History) -> dict[str, Value]:
        """Return the values of candidate `number`, one an axis of the space, in its limits and not in `known.taken`.

        The seed, with which a search begins, is no proposal. Raises SearchFailed where nothing new is left.
        """


def stream(study_seed: int, number: int, redraw: int = 0) -> np.random.Generator:
    """Return the random stream of one candidate, and of one more try where its values were taken."""
    return np.random.default_rng([study_seed, number, redraw])


def first_new(number: int, known: History, draw: Callable[[int], Values]) -> dict[str, Value]:
    """Return the first of draw(0), draw(1), … that no candidate has had; raises SearchFailed where none is new."""
    for redraw in range(REDRAWS):
        values = draw(redraw)
        if known.space.key(values) not in known.taken:
            return dict(values)
    raise SearchFailed(
        f"candidate {number}: {REDRAWS} draws gave nothing new; the space holds nothing more to try"
    )
