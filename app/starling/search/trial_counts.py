"""Running totals over a study's trials. An ended trial never changes, so that each trial is counted once."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterator, Sequence
from datetime import datetime

from optuna.trial import FrozenTrial, TrialState

from starling.search.outcome import SearchProgress, State
from starling.search.spec import FRESH_SEEDS, StudyPlan
from starling.search.trials import FINALIST_OF, FRESH_SEED, IMPORTED

PARENTS = 5
"""Number of best finished candidates from which parents are drawn."""


class Ranking:
    """The best finished trials, the earlier first among equal ones; independent of the order of `add` calls."""

    def __init__(self, size: int = PARENTS) -> None:
        self._size = size
        self._rows: list[tuple[float, int, FrozenTrial]] = []

    def add(self, trial: FrozenTrial) -> None:
        """Add a finished trial."""
        if len(self._rows) == self._size and float(trial.value) < -self._rows[-1][0]:
            return
        bisect.insort(self._rows, (-float(trial.value), trial.number, trial), key=lambda row: row[:2])
        del self._rows[self._size :]

    def trials(self) -> list[FrozenTrial]:
        """Return the best trials, best first."""
        return [trial for _, _, trial in self._rows]


class OpenTrials:
    """The trials that are new or still open since the last `read`, in the order of their numbers."""

    def __init__(self) -> None:
        self._seen = 0
        self.running: list[int] = []

    def read(self, trials: Sequence[FrozenTrial]) -> Iterator[tuple[FrozenTrial, bool]]:
        """Yield the trials that were open at the last call (False), then the new trials (True)."""
        rows = [(trials[number], False) for number in self.running]
        rows += [(trial, True) for trial in trials[self._seen :]]
        self._seen = len(trials)
        self.running = [trial.number for trial, _ in rows if not trial.state.is_finished()]
        yield from rows


class TrialCounts:
    """Totals over all candidates, which a worker needs before it claims one."""

    def __init__(self, max_retries: int, plan: StudyPlan) -> None:
        self._max_retries, self._plan = max_retries, plan
        self._open = OpenTrials()
        self._ranking = Ranking(max(plan.finalists, 1))
        self._orphans: dict[int, FrozenTrial] = {}
        self._finals: dict[tuple[int, int], float] = {}
        """(Finalist, fresh seed) -> fitness; 0 while the training waits or runs, and if it failed."""
        self._finals_running: set[int] = set()
        self.finished = 0
        self.failed = 0
        self.pruned = 0
        self._epochs = 0
        """Epochs of finished and pruned trainings."""
        self._seconds = 0.0
        """Total seconds of all ended attempts, with and without a result."""
        self.last_reason = "no reason given"

    @property
    def running(self) -> list[int]:
        """Numbers of the running attempts."""
        return self._open.running

    @property
    def exploring(self) -> bool:
        """Whether a running candidate may still become a finalist."""
        return not self._finals_running.issuperset(self.running)

    @property
    def committed(self) -> int:
        """Epochs of the budget that are spent, plus the epochs that running attempts may spend."""
        return self._epochs + len(self.running) * self._plan.epochs

    @property
    def orphan(self) -> FrozenTrial | None:
        """The earliest interrupted attempt that waits for a worker to continue it."""
        return next(iter(self._orphans.values()), None)

    @property
    def best_fitness(self) -> float | None:
        """The highest fitness; None before the first finished training."""
        best = self._ranking.trials()
        return float(best[0].value) if best else None

    def next_final(self, finalists: int) -> tuple[FrozenTrial, int] | None:
        """Return the next finalist and the number of its fresh seed; None if all have been started."""
        best = self._ranking.trials()[:finalists]
        pairs = ((trial, seed) for seed in range(FRESH_SEEDS) for trial in best)
        return next(((t, seed) for t, seed in pairs if (t.number, seed) not in self._finals), None)

    def again(self, number: int) -> tuple[float, ...]:
        """Return a finalist's fitness on fresh seeds, in their order; 0 for one that failed or is not finished."""
        seeds = range(FRESH_SEEDS)
        return tuple(self._finals[number, seed] for seed in seeds if (number, seed) in self._finals)

    def progress(self, budget: int) -> SearchProgress:
        """Return the progress of a search with this budget."""
        return SearchProgress(
            budget=budget,
            finished=self.finished,
            running=len(self.running),
            failed=self.failed,
            pruned=self.pruned,
            part_trained=self._epochs / self._plan.epochs - self.finished,
            best_fitness=self.best_fitness,
        )

    def seconds_left(self, trials: Sequence[FrozenTrial], budget: int, now: datetime) -> float | None:
        """Return the seconds until the budget is met, if the running workers go on; None if it is too early to say."""
        began = [trials[number].datetime_start for number in self.running]
        return seconds_left(
            self._seconds, [start for start in began if start is not None], self.progress(budget), now
        )

    def update(self, trials: Sequence[FrozenTrial]) -> None:
        """Count the new trials in `trials`, which holds every trial of the study by number."""
        for trial, is_new in self._open.read(trials):
            if is_new and "retry_of" in trial.user_attrs:
                self._orphans.pop(trial.user_attrs["retry_of"], None)
            if IMPORTED in trial.user_attrs:
                continue
            if trial.state.is_finished():
                self._seconds += seconds_between(trial.datetime_start, trial.datetime_complete)
            if FINALIST_OF in trial.user_attrs:
                self._count_final(trial)
            elif trial.state is TrialState.COMPLETE:
                self._ranking.add(trial)
            if trial.state is TrialState.COMPLETE:
                self.finished += 1
                self._epochs += self._plan.epochs
            elif trial.state is TrialState.PRUNED:
                self.pruned += 1
                # A repair of the journal may have dropped the number; then the last rung that the trial reached counts.
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
        # A finalist has been trained to its end before, so its hyp is not why its workers die; with fewer repetitions
        # it would be judged by fewer trainings than other finalists.
        may_retry = (
            FINALIST_OF in trial.user_attrs or trial.user_attrs.get("lost_before", 0) < self._max_retries
        )
        if ending == State.STOPPED or (ending == State.LOST and may_retry):
            self._orphans[trial.number] = trial
        else:
            self.failed += 1


def seconds_left(
    took_s: float, began: Sequence[datetime], progress: SearchProgress, now: datetime
) -> float | None:
    """Return the seconds until the budget is met, if the trainings running since `began`, and their workers, go on.

    None before the time of one training of full length has been spent: a pruned training's time is mostly its
    start.

    The price of a training is the time of all ended attempts, `took_s`, divided by their sum in full trainings: failed
    and lost attempts are included. The remaining trainings go to whichever worker is free first.
    """
    if progress.over:
        return 0.0
    if progress.spent < 1 or not began:
        return None
    price = took_s / progress.spent
    free_at = [max(price - seconds_between(start, now), 0.0) for start in began]
    end = max(free_at)
    heapq.heapify(free_at)
    for _ in range(int(progress.budget - progress.spent) - len(began)):
        done = free_at[0] + price
        heapq.heapreplace(free_at, done)
        end = max(end, done)
    return end


def seconds_between(began: datetime | None, ended: datetime | None) -> float:
    """Return the seconds between two times; 0 if one is unknown, or if a clock was set back."""
    if began is None or ended is None:
        return 0.0
    return max((ended - began).total_seconds(), 0.0)
