"""Successive halving without waiting: a training that has fallen behind the others gives its time to the next one.

At a rung, a number of epochs, a training goes on only if it is among the best third of all that came this far (Li et
al., A System for Massively Parallel Hyperparameter Tuning, 2020; the stopping variant, in which nobody pauses). The
schedule is that of the full length. What is good early need not be good in the end, so nothing ends early before a few
trainings have shown how well a rung foretells the end, and at a rung that does not, nothing ever does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState

REDUCTION = 3
"""One training in so many goes on from a rung, and the next rung is so many times as far."""
RUNGS = 2
SOUND_CORRELATION = 0.6
"""Between a rung and the end, below which the rung says too little."""
ENOUGH = 8
"""Finished trainings from which a correlation means something."""
_COUNTED = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
"""A failed attempt's successor holds its values."""


@dataclass(frozen=True, slots=True)
class Halving:
    """Where trainings of `epochs` are judged, and how."""

    epochs: int

    @property
    def rungs(self) -> tuple[int, ...]:
        """Epochs after which a training is judged, at most two, the first one early: 30 epochs have 4 and 12."""
        steps = (self.epochs * 1.2 / REDUCTION**power for power in range(RUNGS, 0, -1))
        return tuple(sorted({round(step) for step in steps if 1 <= round(step) < self.epochs}))

    def verdict(self, trials: Sequence[FrozenTrial], number: int, epoch: int) -> str | None:
        """Return why training `number`, which has reached the rung `epoch`, is to end there; None: it goes on."""
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
        """Return how well the order at a rung foretells the order at the end, -1 to 1; None: too few to say.

        Of normal scores, that is of ranks as if drawn from a bell curve, over the finished trainings. These were the
        better ones at the rung, which hides most of a correlation; Thorndike's case II undoes that, by the spread of
        all scores over that of the finished.
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
    """Return the fitness at a rung by number, of every candidate that came this far; finalists are no candidates."""
    return {
        trial.number: trial.intermediate_values[epoch]
        for trial in trials
        if epoch in trial.intermediate_values and trial.state in _COUNTED
    }


def _scores(values: Sequence[float]) -> NDArray[np.float64]:
    """Return the quantile of the normal distribution at each value's rank; equals share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    places = np.cumsum(counts) - counts / 2
    quantile = NormalDist().inv_cdf
    return np.array([quantile(place / len(values)) for place in places.tolist()])[inverse]
