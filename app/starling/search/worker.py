"""A worker of a search: claim a candidate, have it trained, record the result, until the study's budget is met.

A worker knows nothing about the kind of training: that is the task of the `CandidateTrainer`.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from starling.core.errors import ConfigError
from starling.core.worker_status import worker_name
from starling.errors import Pruned, Stopped, is_out_of_memory
from starling.search.exports import Exports
from starling.search.outcome import (
    Candidate,
    CandidateFailed,
    LeaseLost,
    Outcome,
    Report,
    SearchFailed,
    SearchProgress,
    SearchSummary,
    State,
    best_of,
    seed_fitness_of,
)
from starling.search.study import LeasedCandidate, SearchStudy, Turn

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSettings:
    """Settings of one worker; what all workers must agree on is in the study."""

    name: str = field(default_factory=worker_name)
    """Name that is shown with the worker's candidates."""
    poll_s: float = 2.0
    """Seconds between two looks at the study while other workers train the last candidates."""
    remind_s: float = 300.0
    """Seconds between two lines about waiting."""
    failures_in_a_row: int = 5
    """Number of successive failures on this worker after which it gives up."""
    plot: bool = True
    """Whether the worker draws evolve.png and writes report.html."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.poll_s > 0:
            raise ConfigError("poll_s", self.poll_s, "must be above 0 seconds")
        if self.failures_in_a_row < 1:
            raise ConfigError("failures_in_a_row", self.failures_in_a_row, "must be at least 1")


class CandidateTrainer(Protocol):
    """Trains candidates, one after the other. Only `train` is required: the other methods may do nothing."""

    def train(self, candidate: Candidate, report: Report) -> Outcome:
        """Train one candidate and return the result.

        The trainer calls `report` at least once per epoch, and with the fitness after each number of epochs in
        `candidate.glances`; an exception of `report` ends the training. Raises CandidateFailed for a failure that the
        candidate itself causes.
        """
        ...

    def ended(self, candidate: Candidate) -> None:
        """Clean up after a candidate whose end (finished, pruned or failed) is recorded in the study.

        No worker will continue this candidate.
        """

    def progressed(self, progress: SearchProgress, candidate: Candidate | None) -> None:
        """Show the progress of the whole search, and this worker's next candidate; None while the worker waits."""


class Worker:
    """One process that trains candidates of a study; any number of workers may work on one study at the same time."""

    def __init__(
        self,
        study: SearchStudy,
        trainer: CandidateTrainer,
        *,
        settings: WorkerSettings | None = None,
        check_stop: Callable[[], None] = lambda: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`check_stop` is called between candidates and while waiting, to raise Stopped."""
        self._study, self._trainer = study, trainer
        self._settings = settings or WorkerSettings()
        self._check_stop, self._sleep = check_stop, sleep
        self._exports = Exports(study, draws=self._settings.plot)
        self._remind_at = time.monotonic()
        self._failures_in_a_row = 0
        self._trained = 0
        self._told_apart = False
        """Whether it was told that the runs folder is not shared."""

    def run(self) -> SearchSummary:
        """Work until all workers together have finished as many trainings as the budget allows.

        Raises SearchFailed if candidates keep failing; Stopped after returning the candidate to the study;
        CheckpointError if the study cannot be written; ServerError if the study's database stays unreachable; and
        any exception of the trainer that is not a failure of the candidate itself.
        """
        try:
            while (turn := self._ask()) is not Turn.DONE:
                if isinstance(turn, LeasedCandidate):
                    self._train(turn)
                    self._remind_at = time.monotonic()
                else:
                    self._wait()
            self._exports.refresh(last=True)
        finally:
            self._exports.catch_up()
        for rung, correlation in self._study.correlations().items():
            found = (
                "too few have finished to say" if correlation is None else f"correlation {correlation:.2f}"
            )
            logger.info(f"after {rung} epochs against the end: {found}")
        return self._summary()

    def _ask(self) -> LeasedCandidate | Turn:
        self._check_stop()
        turn = self._study.ask(self._settings.name)
        candidate = turn.candidate if isinstance(turn, LeasedCandidate) else None
        self._trainer.progressed(self._study.progress(), candidate)
        return turn

    def _wait(self) -> None:
        """Wait for the last candidates of other workers."""
        self._exports.catch_up()
        if time.monotonic() >= self._remind_at:
            progress = self._study.progress()
            logger.info(f"waiting for {progress.running} running of {progress.budget} candidates")
            self._remind_at = time.monotonic() + self._settings.remind_s
        self._sleep(self._settings.poll_s)

    def _train(self, held: LeasedCandidate) -> None:
        """Have one candidate trained, and record its end."""
        candidate = held.candidate
        if candidate.resumed:
            logger.info(f"{candidate.title}: takes over from {candidate.resumes_from[0].name}")
            self._tell_if_apart(candidate)
        try:
            outcome = self._trainer.train(candidate, self._report_of(held))
            self._study.finish(held, outcome)
        except Pruned as error:
            if self._study.prune(held, error):
                self._trainer.ended(candidate)
            logger.info(f"{candidate.title}: pruned: {error}; {self._so_far()}")
        except LeaseLost as error:
            held.lease.close()
            logger.warning(f"{error}; abandoned here")
        except (Stopped, KeyboardInterrupt) as error:
            self._give_back(held, State.STOPPED, str(error) or "interrupted")
            raise
        except Exception as error:
            self._failed(held, error)
        except BaseException as error:
            self._give_back(held, State.LOST, f"its worker broke: {type(error).__name__}")
            raise
        else:
            self._trainer.ended(candidate)
            self._succeeded(candidate, outcome)

    def _report_of(self, held: LeasedCandidate) -> Report:
        """Return the function through which the trainer reports the progress of this candidate."""

        def report(epoch: int | None = None, fitness: float | None = None) -> None:
            held.lease.renew()
            if epoch is not None and fitness is not None:
                self._study.report(held, epoch, fitness)

        return report

    def _tell_if_apart(self, candidate: Candidate) -> None:
        """Say, once, that the interrupted training is on another host, out of reach."""
        if self._told_apart or not self._study.spans_hosts:
            return
        if not any(folder.is_dir() for folder in candidate.resumes_from):
            self._told_apart = True
            logger.warning(
                "its checkpoint is not in this host's runs folder: such candidates are trained from the beginning "
                "(hosts that share the folder go on from the checkpoint)"
            )

    def _succeeded(self, candidate: Candidate, outcome: Outcome) -> None:
        self._trained += 1
        self._failures_in_a_row = 0
        self._exports.refresh()
        logger.info(f"{candidate.title}: fitness {outcome.fitness:.5g}, {self._so_far()}")

    def _so_far(self) -> str:
        progress = self._study.progress()
        best = "no best yet" if progress.best_fitness is None else f"best {progress.best_fitness:.5g}"
        if not self._study.plan.prune:
            return f"{best}; {progress.finished}/{progress.budget} finished"
        return (
            f"{best}; {progress.spent:.1f} of {progress.budget} trainings' time spent, "
            f"{progress.finished} finished, {progress.pruned} pruned"
        )

    def _failed(self, held: LeasedCandidate, error: Exception) -> None:
        """Record a failure of the candidate itself; otherwise return the candidate to the study and raise."""
        number = held.candidate.number
        reason = failure_reason(error)
        if reason is None:
            self._give_back(held, State.LOST, f"its worker broke: {type(error).__name__}: {error}"[:500])
            raise error
        # The traceback holds the frames of the training, and the frames hold the training's memory.
        error.__traceback__ = None
        gc.collect()
        if self._study.fail(held, State.FAILED, reason):
            self._trainer.ended(held.candidate)
        logger.warning(f"candidate {number}: failed: {reason}")
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= self._settings.failures_in_a_row:
            raise SearchFailed(
                f"{self._failures_in_a_row} candidates in a row failed on this worker, the last with: {reason}"
            )

    def _give_back(self, held: LeasedCandidate, ending: State, reason: str) -> None:
        """Return the candidate to the study; if the study cannot be written, abandon it as a dead worker would."""
        try:
            self._study.fail(held, ending, reason)
        except Exception as error:
            held.lease.abandon()
            logger.warning(
                f"candidate {held.candidate.number}: cannot be given back ({error}); left to be taken over"
            )

    def _summary(self) -> SearchSummary:
        finished = self._study.finished()
        return SearchSummary(
            progress=self._study.progress(),
            best=best_of(finished),
            seed_fitness=seed_fitness_of(finished),
            trained_here=self._trained,
        )


def failure_reason(error: Exception) -> str | None:
    """Return why a candidate failed if the candidate itself caused the failure, else None.

    The candidate itself causes CandidateFailed, and running out of device or host memory.
    """
    if isinstance(error, CandidateFailed):
        return str(error)
    if is_out_of_memory(error):
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"out of memory: {lines[0][:300]}"
    return None
