"""Samplers that do not use results: random points, and evenly spread points."""

from __future__ import annotations

from starling.search.samplers.base import History, first_new, stream
from starling.search.space import Space, Value, Values


class RandomSampler:
    """Draw every axis independently: a gene uniformly between its limits, on its scale, a setting uniformly."""

    def __init__(self, space: Space, seed: Values, study_seed: int) -> None:
        self._space, self._study_seed = space, study_seed

    def propose(self, number: int, known: History) -> dict[str, Value]:
        """Return a random point."""
        return first_new(number, known, lambda redraw: self._draw(number, redraw))

    def _draw(self, number: int, redraw: int) -> Values:
        return self._space.at(stream(self._study_seed, number, redraw).random(len(self._space.axes)).tolist())


class QmcSampler:
    """Propose point `number` of a scrambled Sobol sequence: its first points are always spread evenly over every axis.

    The study's seed determines the sequence, so workers share only the candidate's number. Owen, "Scrambling Sobol'
    and Niederreiter-Xing points" (1998), as in scipy.
    """

    def __init__(self, space: Space, seed: Values, study_seed: int) -> None:
        self._space, self._study_seed = space, study_seed

    def propose(self, number: int, known: History) -> dict[str, Value]:
        """Return the point of the sequence; a random point if its values are taken, as in a space of few choices."""
        return first_new(number, known, lambda redraw: self._draw(number, redraw))

    def _draw(self, number: int, redraw: int) -> Values:
        from scipy.stats import qmc  # type: ignore[import-untyped]  # slow to import

        axes = len(self._space.axes)
        if redraw:
            return self._space.at(stream(self._study_seed, number, redraw).random(axes).tolist())
        sobol = qmc.Sobol(axes, scramble=True, rng=self._study_seed)
        if number > 1:  # candidate 0 is the seed, so candidate 1 takes the first point
            sobol.fast_forward(number - 1)
        return self._space.at(sobol.random(1)[0].tolist())
