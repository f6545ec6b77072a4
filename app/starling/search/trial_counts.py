"""Running totals over a study's trials. An ended trial never changes, so each is counted once, however many there are."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

from optuna.trial import FrozenTrial, TrialState

from starling.search.outcome import State
from starling.search.plan import FRESH_SEEDS, StudyPlan

IMPORTED = "imported"
"""User attribute of a trial that holds a result of an older search: where it was read."""
PARENTS = 5
"""The best finished candidates that a parent is drawn from."""
FINALIST_OF, FRESH_SEED = "finalist_of", "fresh_seed"
"""Attributes of a trial that trains a candidate again."""


class Ranking:
    """The best finished trials, the earlier first among equals; independent of the order of arrival."""

    def __init__(self, size: int = PARENTS) -> None:
        self._size = size
        self._rows: list[tuple[float, int, FrozenTrial]] = []

    def add(self, trial: FrozenTrial) -> None:
        """Take a finished trial into account."""
        if len(self._rows) == self._size and float(trial.value) < -self._rows[-1][0]:
            return
        bisect.insort(self._rows, (-float(trial.value), trial.number, trial), key=lambda row: row[:2])
        del self._rows[self._size :]

    def trials(self) -> list[FrozenTrial]:
        """Return the best trials, best first."""
        return [trial for _, _, trial in self._rows]


class OpenTrials:
    """Which trials are new or still open since the last look, in the order of their numbers."""

    def __init__(self) -> None:
        self._seen = 0
        self.running: list[int] = []

    def read(self, trials: Sequence[FrozenTrial]) -> Iterator[tuple[FrozenTrial, bool]]:
        """Yield trials that were open at the last look (False) and then the new ones (True)."""
        rows = [(trials[number], False) for number in self.running]
        rows += [(trial, True) for trial in trials[self._seen :]]
        self._seen = len(trials)
        self.running = [trial.number for trial, _ in rows if not trial.state.is_finished()]
        yield from rows


class TrialCounts:
    """What a worker needs to know about all candidates before it claims one."""

    def __init__(self, max_retries: int, plan: StudyPlan) -> None:
        self._max_retries, self._plan = max_retries, plan
        self._open = OpenTrials()
        self._ranking = Ranking(max(plan.finalists, 1))
        self._orphans: dict[int, FrozenTrial] = {}
        self._finals: dict[tuple[int, int], float] = {}
        """Finalist and fresh seed to fitness, 0 while there is none: it runs or waits, or failed."""
        self._finals_running: set[int] = set()
        self.finished = 0
        self.failed = 0
        self.pruned = 0
        self._epochs = 0
        """Of trainings that ended as they should."""
        self.last_reason = "no reason given"

    @property
    def running(self) -> list[int]:
        """Numbers of the attempts that are being trained."""
        return self._open.running

    @property
    def exploring(self) -> bool:
        """Whether a candidate is being trained that may yet become a finalist."""
        return not self._finals_running.issuperset(self.running)

    @property
    def committed(self) -> int:
        """Epochs of the budget that are spent, or may be by what is running."""
        return self._epochs + len(self.running) * self._plan.epochs

    @property
    def part_trained(self) -> float:
        """What the pruned trainings ran, in trainings of full length."""
        return self._epochs / self._plan.epochs - self.finished

    @property
    def orphan(self) -> FrozenTrial | None:
        """The earliest attempt that waits for a worker to continue it."""
        return next(iter(self._orphans.values()), None)

    @property
    def best_fitness(self) -> float | None:
        """The highest fitness of all; None before any."""
        best = self._ranking.trials()
        return float(best[0].value) if best else None

    def next_final(self, finalists: int) -> tuple[FrozenTrial, int] | None:
        """Return the next finalist and the number of its fresh seed; None if all have been taken up."""
        best = self._ranking.trials()[:finalists]
        pairs = ((trial, seed) for seed in range(FRESH_SEEDS) for trial in best)
        return next(((t, seed) for t, seed in pairs if (t.number, seed) not in self._finals), None)

    def again(self, number: int) -> tuple[float, ...]:
        """Return a finalist's fitness on fresh seeds, in their order; 0 for one that failed or is not there yet."""
        seeds = range(FRESH_SEEDS)
        return tuple(self._finals[number, seed] for seed in seeds if (number, seed) in self._finals)

    def update(self, trials: Sequence[FrozenTrial]) -> None:
        """Count what is new in `trials`, which holds every trial of the study by number."""
        for trial, is_new in self._open.read(trials):
            if is_new and "retry_of" in trial.user_attrs:
                self._orphans.pop(trial.user_attrs["retry_of"], None)
            if IMPORTED in trial.user_attrs:
                continue
            if FINALIST_OF in trial.user_attrs:
                self._count_final(trial)
            elif trial.state is TrialState.COMPLETE:
                self._ranking.add(trial)
            if trial.state is TrialState.COMPLETE:
                self.finished += 1
                self._epochs += self._plan.epochs
            elif trial.state is TrialState.PRUNED:
                self.pruned += 1
                # A repair of the journal may have dropped the number; the last rung it reached is known.
                reached = max(trial.intermediate_values, default=0)
                self._epochs += int(trial.user_attrs.get("epochs", reached))
            elif trial.state is TrialState.FAIL:
                self._count_failure(trial)

    def _count_final(self, trial: FrozenTrial) -> None:
        key = (int(trial.user_attrs[FINALIST_OF]), int(trial.user_attrs[FRESH_SEED]))
        self._finals[key] = float(trial.value) if trial.state is TrialState.COMPLETE else 0.0
        if trial.state.is_finished():
            self._finals_running.discard(trial.number)
        else:
            self._finals_running.add(trial.number)

    def _count_failure(self, trial: FrozenTrial) -> None:
        self.last_reason = str(trial.user_attrs.get("reason", self.last_reason))
        ending = trial.user_attrs.get("ending")
        # A finalist has been trained to its end before: what its workers die of is not its hyp, and without all of its
        # repetitions it would be judged by fewer than the others.
        may_retry = (
            FINALIST_OF in trial.user_attrs or trial.user_attrs.get("lost_before", 0) < self._max_retries
        )
        if ending == State.STOPPED or (ending == State.LOST and may_retry):
            self._orphans[trial.number] = trial
        else:
            self.failed += 1
