"""Samplers that learn nothing from results: random points, and points spread evenly."""

from __future__ import annotations

from starling.search.samplers.base import History, first_new, stream
from starling.search.space import Space, Value, Values


class RandomSampler:
    """Draw every axis for itself: a gene evenly between its limits, on its own scale, a setting evenly of its choices."""

    def __init__(self, space: Space, seed: Values, study_seed: int) -> None:
        self._space, self._study_seed = space, study_seed

    def propose(self, number: int, known: History) -> dict[str, Value]:
        """Return a random point."""
        return first_new(number, known, lambda redraw: self._draw(number, redraw))

    def _draw(self, number: int, redraw: int) -> Values:
        return self._space.at(stream(self._study_seed, number, redraw).random(len(self._space.axes)).tolist())


class QmcSampler:
    """Take point `number` of a scrambled Sobol sequence: any first part of it is spread evenly over every axis.

    The sequence is the study seed's, so nothing is shared between workers but the number. Owen, "Scrambling Sobol'
    and Niederreiter-Xing points" (1998), as in scipy.
    """

    def __init__(self, space: Space, seed: Values, study_seed: int) -> None:
        self._space, self._study_seed = space, study_seed

    def propose(self, number: int, known: History) -> dict[str, Value]:
        """Return the point; a random one where a space of few choices has had it."""
        return first_new(number, known, lambda redraw: self._draw(number, redraw))

    def _draw(self, number: int, redraw: int) -> Values:
        from scipy.stats import qmc  # type: ignore[import-untyped]  # slow to import

        axes = len(self._space.axes)
        if redraw:
            return self._space.at(stream(self._study_seed, number, redraw).random(axes).tolist())
        sobol = qmc.Sobol(axes, scramble=True, rng=self._study_seed)
        if number > 1:  # candidate 0 is the seed, so that candidate 1 takes the first point
            sobol.fast_forward(number - 1)
        return self._space.at(sobol.random(1)[0].tolist())
