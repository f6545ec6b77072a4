"""Asynchronous successive halving: a training that has fallen behind ends early, and its time goes to the next one.

At a rung, a number of epochs, a training continues only if it is among the best third of all trainings that reached the
rung (Li et al., A System for Massively Parallel Hyperparameter Tuning, 2020; the stopping variant without pauses). The
learning rate schedule is that of the full length. A good early fitness need not mean a good final one: no training ends
early until a few finished trainings show that the rung predicts the end, and never at a rung that does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState

REDUCTION = 3
"""One training in this many continues after a rung, and each rung has this many times the epochs of the one before."""
RUNGS = 2
SOUND_CORRELATION = 0.6
"""Minimum correlation between a rung and the end; at a lower one the rung ends no training."""
ENOUGH = 8
"""Minimum number of finished trainings for a meaningful correlation."""
_COUNTED = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
"""States that count; the values of a failed attempt are in its successor."""


@dataclass(frozen=True, slots=True)
class Halving:
    """The rungs of trainings with `epochs` epochs, and the verdict at a rung."""

    epochs: int

    @property
    def rungs(self) -> tuple[int, ...]:
        """Numbers of epochs after which a training is judged, at most two, the first early: 30 epochs have 4 and 12."""
        steps = (self.epochs * 1.2 / REDUCTION**power for power in range(RUNGS, 0, -1))
        return tuple(sorted({round(step) for step in steps if 1 <= round(step) < self.epochs}))

    def verdict(self, trials: Sequence[FrozenTrial], number: int, epoch: int) -> str | None:
        """Return why training `number`, which has reached the rung `epoch`, must end there; None if it continues."""
        values = _values_at(trials, epoch)
        mine = values[number]
        places = max(len(values) // REDUCTION, 1)
        if sum(value > mine for value in values.values()) < places:
            return None
        correlation = self.correlation(trials, epoch)
        if correlation is None or correlation < SOUND_CORRELATION:
            return None
        last = sorted(values.values(), reverse=True)[places - 1]
        return (
            f"fitness {mine:.4g} after {epoch} of {self.epochs} epochs; the best {places} of {len(values)} so far "
            f"have {last:.4g} or more"
        )

    def correlation(self, trials: Iterable[FrozenTrial], epoch: int) -> float | None:
        """Return how well the order at a rung predicts the order at the end, -1 to 1; None for too few trainings.

        The correlation is one of normal scores (ranks mapped to normal quantiles) of finished trainings. These were
        the better ones at the rung, which lowers the correlation; Thorndike's case II corrects it by the spread of all
        scores over the spread of the finished ones.
        """
        trials = list(trials)
        values = _values_at(trials, epoch)
        finished = [t for t in trials if t.state is TrialState.COMPLETE and t.number in values]
        if len(finished) < ENOUGH:
            return None
        scores = dict(zip(values, _scores(list(values.values())), strict=True))
        early = np.array([scores[trial.number] for trial in finished])
        late = _scores([float(trial.value) for trial in finished])
        if not early.std() or not late.std():
            return 0.0
        found = float(np.corrcoef(early, late)[0, 1])
        spread = float(np.std(list(scores.values())) / early.std())
        return found * spread / float(np.sqrt(1 - found**2 + (found * spread) ** 2))


def _values_at(trials: Iterable[FrozenTrial], epoch: int) -> dict[int, float]:
    """Return the fitness at a rung by number, of every candidate that reached the rung, without finalists."""
    return {
        trial.number: trial.intermediate_values[epoch]
        for trial in trials
        if epoch in trial.intermediate_values and trial.state in _COUNTED
    }


def _scores(values: Sequence[float]) -> NDArray[np.float64]:
    """Return the quantile of the normal distribution at each value's rank; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    places = np.cumsum(counts) - counts / 2
    quantile = NormalDist().inv_cdf
    return np.array([quantile(place / len(values)) for place in places.tolist()])[inverse]
