"""Running totals over a study's trials. An ended trial never changes, so each is counted once, however many there are."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

from optuna.trial import FrozenTrial, TrialState

from app.search.outcome import State

IMPORTED = "imported"
"""User attribute of a trial that holds a result of an older search: where it was read."""
PARENTS = 5
"""The best finished candidates that a parent is drawn from."""


class Ranking:
    """The best finished trials, the earlier first among equals; independent of the order of arrival."""

    def __init__(self, size: int = PARENTS) -> None:
        self._size = size
        self._rows: list[tuple[float, int, FrozenTrial]] = []

    def add(self, trial: FrozenTrial) -> None:
        """Take a finished trial into account."""
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


class Ledger:
    """What a worker needs to know about all candidates before it claims one."""

    def __init__(self, max_retries: int) -> None:
        self._max_retries = max_retries
        self._open = OpenTrials()
        self._ranking = Ranking(1)
        self._orphans: dict[int, FrozenTrial] = {}
        self.finished = 0
        self.failed = 0
        self.last_reason = "no reason given"

    @property
    def running(self) -> list[int]:
        """Numbers of the attempts that are being trained."""
        return self._open.running

    @property
    def orphan(self) -> FrozenTrial | None:
        """The earliest attempt that waits for a worker to continue it."""
        return next(iter(self._orphans.values()), None)

    @property
    def best_fitness(self) -> float | None:
        """The highest fitness of all; None before any."""
        best = self._ranking.trials()
        return float(best[0].value) if best else None

    def update(self, trials: Sequence[FrozenTrial]) -> None:
        """Count what is new in `trials`, which holds every trial of the study by number."""
        for trial, is_new in self._open.read(trials):
            if is_new and "retry_of" in trial.user_attrs:
                self._orphans.pop(trial.user_attrs["retry_of"], None)
            if IMPORTED in trial.user_attrs:
                continue
            if trial.state is TrialState.COMPLETE:
                self.finished += 1
                self._ranking.add(trial)
            elif trial.state is TrialState.FAIL:
                self._count_failure(trial)

    def _count_failure(self, trial: FrozenTrial) -> None:
        self.last_reason = str(trial.user_attrs.get("reason", self.last_reason))
        ending = trial.user_attrs.get("ending")
        may_retry = trial.user_attrs.get("lost_before", 0) < self._max_retries
        if ending == State.STOPPED or (ending == State.LOST and may_retry):
            self._orphans[trial.number] = trial
        else:
            self.failed += 1
