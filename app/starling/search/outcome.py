"""What a search hands to a trainer and gets back, how a candidate can fail, and what the study remembers of it."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

from starling.core.errors import StarlingError

BEST_HYP = "hyp_evolve.yaml"
"""The file of a search's best hyperparameters."""


class CandidateFailed(StarlingError):
    """Training this candidate failed for a reason of its own (NaN, out of memory); the worker goes on."""


class LeaseLost(StarlingError):
    """Another worker took the candidate over, because this one did not respond; its training is to be abandoned."""

    def __init__(self, number: int) -> None:
        super().__init__(f"candidate {number} was taken over by another worker")


class SearchFailed(StarlingError):
    """The search cannot go on: too many of its candidates failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One set of hyperparameters for this worker to train."""

    number: int
    """Its place in the study. A candidate taken over gets a number of its own."""
    hyp: dict[str, float]
    """Every hyperparameter, searched or not."""
    directory: Path
    """Where this attempt writes: `<search>/candidates/0007`. No other worker ever writes there."""
    settings: dict[str, int | str] = field(default_factory=dict)
    """Settings of the training that are searched, such as `batch_size`; empty unless asked for."""
    resumes_from: tuple[Path, ...] = ()
    """Folders of interrupted attempts at the same hyp, newest first; the first that holds a checkpoint is the
    one to resume from. They may still be written to by a worker that was frozen: read them, never write."""

    glances: tuple[int, ...] = ()
    """Epochs after which its fitness is wanted."""
    train_seed: int | None = None
    """Seed of the training; None: the search's own. Finalists have fresh ones."""
    finalist_of: int | None = None
    """The candidate that is trained again, to see whether it was luck."""

    @property
    def title(self) -> str:
        """What people read in lines and tracking pages."""
        again = "" if self.finalist_of is None else f" ({self.finalist_of} again, seed {self.train_seed})"
        return f"candidate {self.number}{again}"

    @property
    def resumed(self) -> bool:
        """Whether an earlier attempt at this candidate was interrupted."""
        return bool(self.resumes_from)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a finished training reached."""

    fitness: float
    """What candidates are ranked by; higher is better."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What else was measured, by name; the study keeps it."""

    def check(self) -> None:
        """Raise CandidateFailed if the fitness is not a finite number, as nothing could be ranked by it."""
        if not math.isfinite(self.fitness):
            raise CandidateFailed(f"fitness is {self.fitness}; the training diverged")


class Report(Protocol):
    """Tell the search that the candidate is alive; to be called at least once an epoch."""

    def __call__(self, epoch: int | None = None, fitness: float | None = None) -> None:
        """Renew the lease, and tell the fitness after so many epochs where the candidate has `glances`.

        Raises LeaseLost if another worker has taken the candidate over, Pruned if it has fallen behind.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A finished candidate, as the study remembers it."""

    number: int
    hyp: dict[str, float]
    fitness: float
    metrics: Mapping[str, float]
    worker: str
    is_seed: bool
    """Whether its hyp is the one that the search started from."""
    settings: dict[str, int | str] = field(default_factory=dict)
    """Settings of the training that are searched; empty unless asked for."""
    finalist_of: int | None = None
    """The candidate that was trained again on a fresh seed."""
    again: tuple[float, ...] = ()
    """Fitness on fresh seeds, of a candidate that was a finalist."""

    @property
    def judged(self) -> float:
        """What it is judged by: the mean over fresh seeds where there are any, as a maximum is partly luck."""
        return sum(self.again) / len(self.again) if self.again else self.fitness


class State(enum.StrEnum):
    """Where an attempt at a candidate stands."""

    RUNNING = "running"
    FINISHED = "finished"
    PRUNED = "pruned"
    """Ended before its last epoch, as it fell behind."""
    FAILED = "failed"
    """The candidate's own fault: not tried again."""
    LOST = "lost"
    """Its worker died, froze or broke: tried again, a few times."""
    STOPPED = "stopped"
    """Its worker was asked to stop: goes on where it was, as often as it takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One training that was begun, as the study remembers it: what the report is made from."""

    number: int
    root: int
    """Number of the first attempt at the same candidate; its own unless that one was interrupted."""
    state: State
    hyp: dict[str, float]
    worker: str
    began: datetime | None
    """By the clock of its worker's host, as `ended`."""
    ended: datetime | None
    fitness: float | None
    """Of a finished training."""
    metrics: Mapping[str, float]
    """Of a finished training, by name; else empty."""
    curve: Mapping[int, float]
    """Epochs trained to fitness, where it was validated on the way."""
    reason: str
    """Why it ended without a result; else empty."""
    settings: dict[str, int | str] = field(default_factory=dict)
    """Settings of the training that are searched; empty unless asked for."""
    epochs: int | None = None
    """Epochs trained when it ended, with those of the attempts that it went on from; None if nobody noted them."""
    finalist_of: int | None = None
    """Number of the candidate whose hyp this one trains again on a fresh seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchProgress:
    """How far the whole search is, over all workers."""

    budget: int
    """In trainings of full length."""
    finished: int
    running: int
    failed: int
    best_fitness: float | None
    pruned: int = 0
    part_trained: float = 0.0
    """What the pruned ones ran, in trainings of full length."""

    @property
    def spent(self) -> float:
        """What has ended, in trainings of full length; failures are not in it."""
        return self.finished + self.part_trained

    @property
    def over(self) -> bool:
        """Whether the budget has no room for another training."""
        return self.budget - self.spent < 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSummary:
    """How a search ended."""

    progress: SearchProgress
    best: Finished
    seed_fitness: float | None
    """Fitness of the hyp that the search started from; None if it failed."""
    trained_here: int
    """Candidates that this worker finished."""


def seed_fitness_of(finished: Sequence[Finished]) -> float | None:
    """Return the fitness of the hyp that the search started from; None before it has finished."""
    return next((candidate.fitness for candidate in finished if candidate.is_seed), None)


def best_of(finished: Sequence[Finished]) -> Finished:
    """Return the candidate of highest fitness, the earliest among equals; of finalists if there are any.

    Those are judged by their trainings on fresh seeds alone.
    """
    candidates = [candidate for candidate in finished if candidate.finalist_of is None]
    finalists = [candidate for candidate in candidates if candidate.again]
    return max(finalists or candidates, key=lambda candidate: (candidate.judged, -candidate.number))
