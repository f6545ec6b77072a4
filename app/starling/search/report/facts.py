"""What the report shows, worked out from the study: pure figures, no HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from starling.search.outcome import Attempt, Finished, SearchProgress, State, best_of
from starling.search.study import SearchStudy

VALIDATION_SHARE = 1 / 3
"""What an image costs in a validation (forward only) against one in training (forward and backward)."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one attempt added to the bill."""

    epochs: int
    """Trained in this attempt."""
    images: float | None
    """Through the model, those of validations at a third; None where the study does not know its images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """A search at one moment."""

    name: str
    directory: Path
    now: datetime
    progress: SearchProgress
    attempts: Sequence[Attempt]
    finished: Sequence[Finished]
    best: Finished | None
    seed_hyp: Mapping[str, float]
    signature: Mapping[str, Any]
    training: Mapping[str, Any]
    imported: int
    costs: Mapping[int, Cost]
    """By the number of the attempt."""

    @property
    def seed_fitness(self) -> float | None:
        """Fitness of the hyp that the search started from; None before it has finished."""
        return next((candidate.fitness for candidate in self.finished if candidate.is_seed), None)

    @property
    def genes(self) -> list[str]:
        """Hyperparameters that differ between attempts, in their order."""
        return [name for name in self.seed_hyp if len({a.hyp.get(name) for a in self.attempts}) > 1]

    def count(self, state: State) -> int:
        """Return how many attempts are in a state."""
        return sum(attempt.state is state for attempt in self.attempts)


def read_facts(study: SearchStudy, now: datetime) -> Facts:
    """Return what the study says; `now` is the time that running candidates are shown until."""
    finished, attempts, training = study.finished(), study.attempts(), study.training
    return Facts(
        name=f"{study.directory.parent.name}/{study.directory.name}",
        directory=study.directory,
        now=now,
        progress=study.progress(),
        attempts=attempts,
        finished=finished,
        best=best_of(finished) if finished else None,
        seed_hyp=study.seed_hyp,
        signature=study.signature,
        training=training,
        imported=study.imported(),
        costs=costs_of(
            attempts,
            full_epochs=_whole(study.signature.get("epochs")),
            train_images=_whole(training.get("train_images")),
            val_images=_whole(training.get("val_images")),
        ),
    )


def costs_of(
    attempts: Iterable[Attempt],
    *,
    full_epochs: int | None,
    train_images: int | None,
    val_images: int | None,
) -> dict[int, Cost]:
    """Return what each attempt cost, by number.

    One that went on from an interrupted attempt is charged for what it added, a finished one up to `full_epochs`.
    What nobody noted (a worker killed in its first candidate) is charged to the attempt that went on from it.
    """
    costs: dict[int, Cost] = {}
    done_before: dict[int, int] = {}
    for attempt in attempts:
        before = done_before.get(attempt.root, 0)
        after = max(_epochs_done(attempt, full_epochs), before)
        done_before[attempt.root] = after
        images = None
        if train_images is not None:
            validations = sum(epoch > before for epoch in attempt.curve)
            validations += attempt.state is State.FINISHED  # after its last epoch, which the curve leaves out
            images = (after - before) * train_images + validations * (val_images or 0) * VALIDATION_SHARE
        costs[attempt.number] = Cost(after - before, images)
    return costs


def _epochs_done(attempt: Attempt, full_epochs: int | None) -> int:
    if attempt.epochs is not None:
        return attempt.epochs
    if attempt.state is State.FINISHED and full_epochs is not None:
        return full_epochs
    return max(attempt.curve, default=0)


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


@dataclass(frozen=True, slots=True)
class WorkerTime:
    """How one worker spent its time, in seconds."""

    name: str
    attempts: Sequence[Attempt]
    busy: float
    """In trainings, however they ended."""
    idle: float
    """Between two trainings."""
    away: float
    """Between a training that it was stopped or lost in and its next one."""

    @property
    def idle_share(self) -> float:
        """Return idle / (busy + idle)."""
        return self.idle / (self.busy + self.idle) if self.idle else 0.0


def worker_times(attempts: Iterable[Attempt], now: datetime) -> list[WorkerTime]:
    """Return the workers in the order in which they joined, by their own clocks; running trainings last until `now`."""
    by_worker: dict[str, list[Attempt]] = {}
    for attempt in sorted((a for a in attempts if a.began is not None), key=lambda a: (a.began, a.number)):
        by_worker.setdefault(attempt.worker, []).append(attempt)
    return [_time_of(name, own, now) for name, own in by_worker.items()]


def _time_of(name: str, own: list[Attempt], now: datetime) -> WorkerTime:
    busy = idle = away = 0.0
    free_since: datetime | None = None
    was_cut_off = False
    for attempt in own:
        began, ended = attempt.began, end_of(attempt, now)
        assert began is not None
        if free_since is not None and began > free_since:
            gap = (began - free_since).total_seconds()
            idle, away = (idle, away + gap) if was_cut_off else (idle + gap, away)
        # A lost attempt ends when somebody notices, maybe after the worker is back.
        start = began if free_since is None else max(began, free_since)
        if ended > start:
            busy += (ended - start).total_seconds()
            free_since = ended
        was_cut_off = attempt.state in (State.LOST, State.STOPPED)
    return WorkerTime(name, own, busy, idle, away)


def end_of(attempt: Attempt, now: datetime) -> datetime:
    """Return when an attempt ended, never before it began; `now` for one that runs."""
    began = attempt.began or now
    return max(attempt.ended or now, began)
