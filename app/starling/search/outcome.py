"""What a search passes to a trainer and gets back, how a candidate can fail, and what the study records of it."""

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
    """The candidate itself made its training fail (NaN, out of memory); the worker goes on."""


class LeaseLost(StarlingError):
    """Another worker took the candidate over, because this worker did not respond; the training must be abandoned."""

    def __init__(self, number: int) -> None:
        super().__init__(f"candidate {number} was taken over by another worker")


class SearchFailed(StarlingError):
    """The search cannot go on, because too many candidates failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One set of hyperparameters for this worker to train."""

    number: int
    """Number in the study. A candidate that is taken over gets a new number."""
    hyp: dict[str, float]
    """All hyperparameters, searched or not."""
    directory: Path
    """Folder of this attempt: `<search>/candidates/0007`. Only this worker writes there."""
    settings: dict[str, int | str] = field(default_factory=dict)
    """Searched settings of the training, such as `batch_size`; empty if the space has no settings."""
    resumes_from: tuple[Path, ...] = ()
    """Folders of interrupted attempts at the same hyp, newest first; the training resumes from the first one with a
    checkpoint. A frozen worker may still write to these folders: read them, never write."""

    glances: tuple[int, ...] = ()
    """Numbers of epochs after which the trainer must report the fitness."""
    train_seed: int | None = None
    """Seed of the training; None for the seed of the search. Finalists have fresh seeds."""
    finalist_of: int | None = None
    """Number of the candidate that this finalist trains again, to see whether its fitness was luck."""

    @property
    def title(self) -> str:
        """Name of the candidate in printed lines and on tracking pages."""
        again = "" if self.finalist_of is None else f" ({self.finalist_of} again, seed {self.train_seed})"
        return f"candidate {self.number}{again}"

    @property
    def resumed(self) -> bool:
        """Whether an earlier attempt at this candidate was interrupted."""
        return bool(self.resumes_from)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The result of a finished training."""

    fitness: float
    """The value that candidates are ranked by; higher is better."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Other measured values by name; the study stores them."""

    def check(self) -> None:
        """Raise CandidateFailed if the fitness is not a finite number, because such a fitness cannot be ranked."""
        if not math.isfinite(self.fitness):
            raise CandidateFailed(f"fitness is {self.fitness}; the training diverged")


class Report(Protocol):
    """Report to the search that the candidate is alive; the trainer calls it at least once per epoch."""

    def __call__(self, epoch: int | None = None, fitness: float | None = None) -> None:
        """Renew the lease; with `epoch` and `fitness`, record the fitness after that many epochs, as `glances` asks.

        Raises LeaseLost if another worker has taken the candidate over, Pruned if the candidate has fallen behind.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A finished candidate, as the study stores it."""

    number: int
    hyp: dict[str, float]
    fitness: float
    metrics: Mapping[str, float]
    worker: str
    is_seed: bool
    """Whether the candidate has the hyp that the search started from."""
    settings: dict[str, int | str] = field(default_factory=dict)
    """Searched settings of the training; empty if the space has no settings."""
    finalist_of: int | None = None
    """Number of the candidate that this finalist trained again on a fresh seed."""
    again: tuple[float, ...] = ()
    """Fitness on fresh seeds, if the candidate was a finalist."""

    @property
    def judged(self) -> float:
        """The fitness to judge by: the mean over fresh seeds if there are any, because a maximum is partly luck."""
        return sum(self.again) / len(self.again) if self.again else self.fitness


class State(enum.StrEnum):
    """State of an attempt at a candidate."""

    RUNNING = "running"
    FINISHED = "finished"
    PRUNED = "pruned"
    """Ended before the last epoch, because the candidate fell behind."""
    FAILED = "failed"
    """The candidate itself failed; it is not tried again."""
    LOST = "lost"
    """The worker died, froze or broke; the candidate is tried again, a limited number of times."""
    STOPPED = "stopped"
    """The worker was asked to stop; the candidate is resumed, without a limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """A started training, as the study stores it; the report is made from attempts."""

    number: int
    root: int
    """Number of the first attempt at the same candidate; equal to `number` for the first attempt."""
    state: State
    hyp: dict[str, float]
    worker: str
    began: datetime | None
    """Time of the start; `began` and `ended` are by the clock of the worker's host."""
    ended: datetime | None
    fitness: float | None
    """Fitness of a finished training; otherwise None."""
    metrics: Mapping[str, float]
    """Metrics of a finished training by name; otherwise empty."""
    curve: Mapping[int, float]
    """Number of epochs -> fitness, for validations before the end."""
    reason: str
    """Reason of an end without a result; otherwise empty."""
    settings: dict[str, int | str] = field(default_factory=dict)
    """Searched settings of the training; empty if the space has no settings."""
    epochs: int | None = None
    """Number of trained epochs at the end, including the interrupted attempts before; None if not recorded."""
    finalist_of: int | None = None
    """Number of the candidate whose hyp this attempt trains again on a fresh seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchProgress:
    """Progress of the whole search, over all workers."""

    budget: int
    """Number of trainings of full length."""
    finished: int
    running: int
    failed: int
    best_fitness: float | None
    pruned: int = 0
    part_trained: float = 0.0
    """Training time of the pruned attempts, in trainings of full length."""

    @property
    def spent(self) -> float:
        """Training time of ended attempts without failures, in trainings of full length."""
        return self.finished + self.part_trained

    @property
    def over(self) -> bool:
        """Whether the rest of the budget is too small for another training."""
        return self.budget - self.spent < 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSummary:
    """The result of a search."""

    progress: SearchProgress
    best: Finished
    seed_fitness: float | None
    """Fitness of the hyp that the search started from; None if that training failed."""
    trained_here: int
    """Number of candidates that this worker finished."""


def seed_fitness_of(finished: Sequence[Finished]) -> float | None:
    """Return the fitness of the hyp that the search started from; None before that training has finished."""
    return next((candidate.fitness for candidate in finished if candidate.is_seed), None)


def best_of(finished: Sequence[Finished]) -> Finished:
    """Return the candidate with the highest fitness, the earliest among equal ones; of finalists, if there are any.

    Finalists are judged by their trainings on fresh seeds alone.
    """
    candidates = [candidate for candidate in finished if candidate.finalist_of is None]
    finalists = [candidate for candidate in candidates if candidate.again]
    return max(finalists or candidates, key=lambda candidate: (candidate.judged, -candidate.number))
