"""The sampler protocol: a pure function from a candidate's number and the known results to the candidate's values."""

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
"""Maximum number of draws in the search for new values."""


class Sampler(Protocol):
    """Propose candidates for one study.

    A proposal is a function of the study's seed, the candidate's number and the known results: workers that ask with
    different numbers share no random stream, whenever they start, and a worker that asks again gets the same proposal.
    """

    def propose(self, number: int, known: History) -> dict[str, Value]:
        """Return the values of candidate `number`, one per axis of the space, within limits and not in `known.taken`.

        A sampler never proposes the seed, with which a search begins. Raises SearchFailed if no new values are left.
        """


def stream(study_seed: int, number: int, redraw: int = 0) -> np.random.Generator:
    """Return the random stream of one candidate; each `redraw`, after values that were taken, has another stream."""
    return np.random.default_rng([study_seed, number, redraw])


def first_new(number: int, known: History, draw: Callable[[int], Values]) -> dict[str, Value]:
    """Return the first of draw(0), draw(1), … that no candidate has had; raises SearchFailed if none is new."""
    for redraw in range(REDRAWS):
        values = draw(redraw)
        if known.space.key(values) not in known.taken:
            return dict(values)
    raise SearchFailed(
        f"candidate {number}: {REDRAWS} draws gave nothing new; the space holds nothing more to try"
    )


@dataclass(frozen=True, slots=True)
class Observation:
    """The result of one candidate, over all its attempts."""

    number: int
    """Number of the candidate's first attempt."""
    values: Values
    fitness: float | None = None
    """Fitness of a finished training, or the last fitness of a pruned training; None for a failed candidate."""
    epochs: int | None = None
    """Number of epochs after which a training was pruned; None for other trainings."""


class History:
    """The candidates of a study, grouped by their results; `update` reads new trials.

    An interrupted attempt and the attempts that continue it are one candidate. All answers depend on the
    trials alone, not on the time of the calls.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self.taken: set[tuple[Value, ...]] = set()
        """Values of every candidate so far, in the order of the axes, whatever its result."""
        self.begun = False
        """Whether the study has a candidate that is not imported; the first such candidate is the seed."""
        self._read, self._ranking = OpenTrials(), Ranking()
        self._finished: dict[int, Observation] = {}
        self._pruned: dict[int, Observation] = {}
        self._failed: dict[int, Observation] = {}
        self._open: dict[int, Values] = {}

    @property
    def best(self) -> list[tuple[float, Values]]:
        """The five best finished candidates, as (fitness, values), best first, the earlier first among equal ones."""
        return [(float(trial.value), trial.params) for trial in self._ranking.trials()]

    @property
    def finished(self) -> list[Observation]:
        """Finished candidates, including imported ones, by number."""
        return _by_number(self._finished)

    @property
    def pruned(self) -> list[Observation]:
        """Pruned candidates, by number."""
        return _by_number(self._pruned)

    @property
    def failed(self) -> list[Observation]:
        """Candidates that failed for a reason of the candidate itself, such as a diverging loss, by number."""
        return _by_number(self._failed)

    @property
    def open(self) -> list[Values]:
        """Values of candidates that are running, or wait for a worker to continue them, by number."""
        return [self._open[number] for number in sorted(self._open)]

    def update(self, trials: Sequence[FrozenTrial]) -> None:
        """Read the new trials in `trials`, which holds every trial of the study by number."""
        for trial, is_new in self._read.read(trials):
            self.begun |= IMPORTED not in trial.user_attrs
            if FINALIST_OF in trial.user_attrs or not self.space.understands(trial.params):
                continue  # a finalist repeats a known candidate; other spaces are not comparable
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
