"""A Gaussian process over the whole space, fitted by Optuna's GPSampler in a temporary study."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from starling.search.samplers.base import History, Observation, first_new, stream
from starling.search.samplers.fast import FastSampler, FastSettings
from starling.search.space import Space, Value, Values

LEAST_FINISHED = 8
"""Minimum number of results for a fit; earlier candidates are drawn around the seed, as by the fast sampler."""
MOST_FINISHED = 200
"""Maximum number of results in a fit, the best half and the latest half. The cost grows with their third power."""

# This logger would recommend in every process an optional package that saves a little time.
logging.getLogger("optuna._gp.batched_lbfgsb").setLevel(logging.ERROR)


class GaussianSampler:
    """Propose the point with the largest expected gain of a Gaussian process, given the running candidates."""

    def __init__(self, space: Space, seed: Values, study_seed: int) -> None:
        self._space, self._study_seed = space, study_seed
        self._limits = space.distributions()
        self._around_seed = FastSampler(space, seed, study_seed, FastSettings(startup=LEAST_FINISHED))

    def propose(self, number: int, known: History) -> dict[str, Value]:
        """Return the point with the largest expected gain; a point around the seed while few results are known."""
        finished = known.finished
        if len(finished) < LEAST_FINISHED:
            return self._around_seed.propose(number, known)
        rows = [self._trial(observation) for observation in _most_telling(finished)]
        others = [self._trial(Observation(-1, values)) for values in known.open]
        return first_new(number, known, lambda redraw: self._draw(number, redraw, rows, others))

    def _draw(
        self, number: int, redraw: int, rows: Sequence[FrozenTrial], others: Sequence[FrozenTrial]
    ) -> Values:
        rng = stream(self._study_seed, number, redraw)
        sampler = optuna.samplers.GPSampler(seed=int(rng.integers(2**31)), n_startup_trials=1)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials([*rows, *others])
        proposed = study.ask(self._limits).params
        if redraw:  # the optimum is the candidate of another worker: take a point near it
            positions = self._space.positions(proposed) + rng.normal(0, 0.02 * redraw, len(self._limits))
            return self._space.at(positions.tolist())
        return self._space.at(self._space.positions(proposed))

    def _trial(self, observation: Observation) -> FrozenTrial:
        state = TrialState.RUNNING if observation.fitness is None else TrialState.COMPLETE
        # The seed and imported candidates may lie outside the limits.
        inside = self._space.at(self._space.positions(observation.values))
        return create_trial(state=state, value=observation.fitness, params=inside, distributions=self._limits)


def _most_telling(finished: Sequence[Observation]) -> list[Observation]:
    """Return at most MOST_FINISHED observations by number: the best half, and the latest of the others."""
    if len(finished) <= MOST_FINISHED:
        return list(finished)
    ranked = sorted(finished, key=lambda observation: (-(observation.fitness or 0.0), observation.number))
    best = ranked[: MOST_FINISHED // 2]
    latest = sorted(ranked[MOST_FINISHED // 2 :], key=lambda observation: observation.number)
    return sorted([*best, *latest[-MOST_FINISHED // 2 :]], key=lambda observation: observation.number)
