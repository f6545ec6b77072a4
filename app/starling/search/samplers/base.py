"""What every sampler is: a pure function from a candidate's number and what is known to its values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from starling.search.outcome import SearchFailed, State
from starling.search.space import Space, Value, Values
from starling.search.trial_counts import OpenTrials, Ranking
from starling.search.trials import FINALIST_OF, IMPORTED

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


@dataclass(frozen=True, slots=True)
class Observation:
    """What became of one candidate, however many attempts it took."""

    number: int
    """Of its first attempt."""
    values: Values
    fitness: float | None = None
    """Of a finished training, or the last one that a pruned training reached; None where it failed."""
    epochs: int | None = None
    """Epochs after which a pruned training was ended; None for every other."""


class History:
    """The candidates of a study by what became of them; `update` reads what is new.

    An interrupted attempt and those that continue it are one candidate. Its answers depend on the
    trials alone, not on when they were read.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self.taken: set[tuple[Value, ...]] = set()
        """Values of every candidate so far, in the order of the axes, whatever became of it."""
        self.begun = False
        """Whether the study has a candidate of its own, which then is the seed: imported ones are not."""
        self._read, self._ranking = OpenTrials(), Ranking()
        self._finished: dict[int, Observation] = {}
        self._pruned: dict[int, Observation] = {}
        self._failed: dict[int, Observation] = {}
        self._open: dict[int, Values] = {}

    @property
    def best(self) -> list[tuple[float, Values]]:
        """The best five finished candidates, as (fitness, values), best first, the earlier first among equals."""
        return [(float(trial.value), trial.params) for trial in self._ranking.trials()]

    @property
    def finished(self) -> list[Observation]:
        """Finished candidates, imported ones too, by number."""
        return _by_number(self._finished)

    @property
    def pruned(self) -> list[Observation]:
        """Candidates that were ended early, by number."""
        return _by_number(self._pruned)

    @property
    def failed(self) -> list[Observation]:
        """Candidates that failed by a fault of their own, such as a diverging loss, by number."""
        return _by_number(self._failed)

    @property
    def open(self) -> list[Values]:
        """Values of candidates that are being trained, or wait for a worker to go on with them, by number."""
        return [self._open[number] for number in sorted(self._open)]

    def update(self, trials: Sequence[FrozenTrial]) -> None:
        """Read what is new in `trials`, which holds every trial of the study by number."""
        for trial, is_new in self._read.read(trials):
            self.begun |= IMPORTED not in trial.user_attrs
            if FINALIST_OF in trial.user_attrs or not self.space.understands(trial.params):
                continue  # a candidate that is known, or one of another space: nothing to compare with
            if is_new:
                self.taken.add(self.space.key(trial.params))
            self._place(trial)

    def _place(self, trial: FrozenTrial) -> None:
        number, values = int(trial.user_attrs.get("root", trial.number)), trial.params
        self._open.pop(number, None)
        match trial.state:
            case TrialState.COMPLETE:
                self._finished[number] = Observation(number, values, float(trial.value))
                self._ranking.add(trial)
            case TrialState.PRUNED:
                epochs, fitness = max(trial.intermediate_values.items(), default=(0, None))
                self._pruned[number] = Observation(number, values, fitness, int(epochs))
            case TrialState.FAIL if trial.user_attrs.get("ending") == State.FAILED:
                self._failed[number] = Observation(number, values)
            case _:
                self._open[number] = values


def _by_number(observations: dict[int, Observation]) -> list[Observation]:
    return [observations[number] for number in sorted(observations)]
