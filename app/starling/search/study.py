"""The study: one budget, one numbering, one list of candidates for all workers of a search."""

from __future__ import annotations

import enum
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import optuna
from optuna.trial import FrozenTrial, TrialState

from starling.core.errors import UsageError
from starling.errors import Pruned
from starling.search.outcome import (
    Attempt,
    Candidate,
    Finished,
    LeaseLost,
    Outcome,
    SearchFailed,
    SearchProgress,
    State,
)
from starling.search.samplers.proposer import Proposer
from starling.search.space import split_values
from starling.search.spec import (
    FRESH_SEEDS,
    StudyPlan,
    StudyRules,
    StudySpec,
    check_definition,
    check_version,
)
from starling.search.storage.journal import JOURNAL, understood
from starling.search.storage.leases import Lease
from starling.search.storage.storage import StudyStorage, load_study, open_storage, persistent
from starling.search.trial_counts import TrialCounts
from starling.search.trials import (
    FINALIST_OF,
    FRESH_SEED,
    IMPORTED,
    SAMPLER,
    SEED,
    NextAttempt,
    TrialRecords,
    as_attempt,
    as_finished,
)

_DEFINITION, _BUDGET, _UUID, _TRAINING = "definition", "budget", "uuid", "training"
"""Attributes of the study."""


class Turn(enum.Enum):
    """What a worker that got no candidate is to do."""

    WAIT = "wait"
    """Others train the last candidates; one may have to be taken over."""
    DONE = "done"
    """The budget is used up."""


@dataclass(frozen=True, slots=True)
class LeasedCandidate:
    """A candidate, and the lease by which this worker holds it."""

    candidate: Candidate
    lease: Lease
    is_seed: bool
    """Whether it trains the hyp that the search started from."""


class SearchStudy:
    """A worker's view of the study."""

    def __init__(
        self,
        directory: Path,
        storage: StudyStorage,
        study: optuna.Study,
        definition: Mapping[str, Any],
        rules: StudyRules,
        proposer: Proposer | None = None,
    ) -> None:
        self.directory = directory
        self.seed_hyp: dict[str, float] = dict(definition["hyp"])
        self.signature: dict[str, Any] = dict(definition["signature"])
        """What the fitness depends on besides the hyp, as it was given when the study began."""
        self.uuid = str(study.user_attrs.get(_UUID, ""))
        """The search's own id, the same for all workers; its candidates' runs are children of it."""
        self.spans_hosts = storage.spans_hosts
        """Whether its workers may lack each other's folders."""
        self._storage = storage
        self._study = study
        self._rules = rules
        self._proposer = proposer
        self.plan = StudyPlan.from_mapping(definition["plan"])
        self._seed = int(definition["seed"])
        self._counts = TrialCounts(rules.max_retries, self.plan)
        self._records = TrialRecords(storage.optuna, study)
        self._watch = storage.watch(rules.lease_s)
        # The first look at a large study takes a while: now, and not while the first ask keeps all others waiting.
        trials = self._trials()
        if proposer is not None:
            with understood(storage.where):
                proposer.read(trials)

    @classmethod
    def open_or_create(
        cls,
        directory: Path,
        spec: StudySpec,
        *,
        storage: StudyStorage | None = None,
        rules: StudyRules | None = None,
    ) -> Self:
        """Join the study in `directory`, or start it; any number of workers may do so at once.

        Raises UsageError where the study was started with another hyp, seed, space, plan or signature, saying which.
        """
        directory, definition = directory.absolute(), spec.definition()
        proposer = Proposer.of(spec.sampler, spec.searched, {**spec.start, **spec.settings}, spec.seed)
        opened = storage or open_storage("", directory)

        def join() -> optuna.Study:
            with opened.lock(), understood(opened.where):
                study = load_study(opened) or optuna.create_study(
                    study_name=opened.study_name, storage=opened.optuna, direction="maximize"
                )
                attributes = study.user_attrs
                if _UUID not in attributes:
                    study.set_user_attr(_UUID, uuid.uuid4().hex)
                if _DEFINITION in attributes:
                    check_definition(directory, attributes[_DEFINITION], definition)
                else:
                    study.set_user_attr(_DEFINITION, definition)
                if spec.budget > attributes.get(_BUDGET, 0):
                    study.set_user_attr(_BUDGET, spec.budget)
            return study

        return opened.persist(
            lambda: cls(directory, opened, join(), definition, rules or StudyRules(), proposer)
        )

    @classmethod
    def read(cls, directory: Path, *, url: str = "") -> Self:
        """Open the study of `directory`, or of that name in the database `url`, to look at it; nothing is written.

        Raises UsageError if there is none.
        """
        directory = directory.absolute()
        absent = UsageError(f"{directory}: holds no search; give the folder that has {JOURNAL}")
        if not url and not (directory / JOURNAL).is_file():
            raise absent
        storage = open_storage(url, directory, create=False)
        if url:
            absent = UsageError(
                f"{storage.where}: there is no such study; give the search's folder below the runs"
            )
        with understood(storage.where):
            study = load_study(storage)
            definition = None if study is None else study.user_attrs.get(_DEFINITION)
            if study is None or definition is None:
                raise absent
            check_version(directory, definition)
            return cls(directory, storage, study, definition, StudyRules())

    @property
    @persistent
    def budget(self) -> int:
        """Trainings of full length that the search may spend."""
        with understood(self._storage.where):
            return int(self._study.user_attrs.get(_BUDGET, 0))

    @property
    @persistent
    def training(self) -> dict[str, Any]:
        """What `describe` was given; empty before."""
        with understood(self._storage.where):
            return dict(self._study.user_attrs.get(_TRAINING, {}))

    @persistent
    def describe(self, training: Mapping[str, Any]) -> None:
        """Keep what the report tells of the trainings themselves: command and images. The first worker's stands."""
        with self._storage.lock():
            if _TRAINING not in self._study.user_attrs:
                self._study.set_user_attr(_TRAINING, dict(training))

    @persistent
    def ask(self, worker: str) -> LeasedCandidate | Turn:
        """Claim the next candidate: one to take over if there is, else a new one while the budget lasts.

        What has ended and what is running together never exceed the budget, so it is met exactly; where trainings
        are cut short, less than one may be left. The last part of it is the finalists', once all others have ended.

        Raises SearchFailed when so many candidates failed that more would be a waste.
        """
        with self._storage.lock():
            trials = self._reap()
            next_attempt = self._next_attempt(trials)
            if next_attempt is None:
                return Turn.WAIT if self._counts.running else Turn.DONE
            progress = self._counts.progress(self.budget)
            if progress.failed >= progress.budget + self._rules.spare_failures:
                raise SearchFailed(
                    f"{self.directory}: {progress.failed} candidates failed, the last with: "
                    f"{self._counts.last_reason}; correct that, then search under another --name"
                )
            return self._claim(trials, next_attempt, worker)

    def _next_attempt(self, trials: Sequence[FrozenTrial]) -> NextAttempt | None:
        """Return what is to be trained next; None if nothing is left, or for now. The study is locked."""
        counts, finalists = self._counts, self.plan.finalists_of(self.budget)
        room = (self.budget * self.plan.epochs - counts.committed) // self.plan.epochs
        if room and counts.orphan is not None:
            with understood(self._storage.where):
                return NextAttempt.continuing(trials, counts.orphan)
        if room > finalists * FRESH_SEEDS:
            assert self._proposer is not None, "opened to be read only"
            with understood(self._storage.where):
                self._proposer.read(trials)
            return self._proposer.propose(len(trials), trials)
        if room and not counts.exploring and (final := counts.next_final(finalists)):
            return NextAttempt.repeating(*final)
        return None

    @persistent
    def report(self, held: LeasedCandidate, epoch: int, fitness: float) -> None:
        """Record the fitness on the way. Raises Pruned where the candidate has fallen behind, LeaseLost if it is lost."""
        number, halving = held.candidate.number, self.plan.halving
        with self._storage.lock():
            self._records.report(number, epoch, fitness)
        # What everything is compared with is trained to the end.
        if halving is None or held.is_seed:
            return
        trials = self._trials()
        with understood(self._storage.where):
            reason = halving.verdict(trials, number, epoch)
        if reason:
            raise Pruned(reason, epoch)

    @persistent
    def prune(self, held: LeasedCandidate, pruned: Pruned) -> bool:
        """Record that a candidate was ended early; return False if it was taken over meanwhile."""
        return self._end(held, {"epochs": pruned.epoch, "reason": str(pruned)}, TrialState.PRUNED)

    @persistent
    def correlations(self) -> dict[int, float | None]:
        """Return how well each rung foretells the end, -1 to 1; None where too few have finished to say."""
        halving, trials = self.plan.halving, self._trials()
        with understood(self._storage.where):
            return {rung: halving.correlation(trials, rung) for rung in halving.rungs} if halving else {}

    @persistent
    def finish(self, held: LeasedCandidate, outcome: Outcome) -> None:
        """Record a result. Raises LeaseLost if the candidate was taken over, CandidateFailed for a NaN fitness."""
        outcome.check()
        metrics = {"metrics": dict(outcome.metrics)}
        if not self._end(held, metrics, TrialState.COMPLETE, float(outcome.fitness)):
            raise LeaseLost(held.candidate.number)

    @persistent
    def fail(self, held: LeasedCandidate, ending: State, reason: str) -> bool:
        """Record that an attempt ended without a result; return False if it was taken over meanwhile."""
        return self._end(held, {"ending": str(ending), "reason": reason}, TrialState.FAIL)

    @persistent
    def add_known(self, choose: Callable[[Sequence[FrozenTrial]], Sequence[FrozenTrial]]) -> int:
        """Append finished trials marked with IMPORTED, which `choose` makes from those that are there; return how many.

        They are parents for the sampler, and neither candidates of this search nor part of its budget.
        """
        with self._storage.lock():
            known = choose(self._trials())
            for trial in known:
                self._study.add_trial(trial)
        return len(known)

    @persistent
    def finished(self) -> list[Finished]:
        """Return the finished candidates in the order of their numbers."""
        with understood(self._storage.where):
            own = [trial for trial in self._trials() if IMPORTED not in trial.user_attrs]
            return [
                as_finished(trial, self.seed_hyp, self._counts.again(trial.number))
                for trial in own
                if trial.state is TrialState.COMPLETE
            ]

    @persistent
    def attempts(self) -> list[Attempt]:
        """Return every training that was begun, in the order of their numbers."""
        with understood(self._storage.where):
            own = [trial for trial in self._trials() if IMPORTED not in trial.user_attrs]
            return [as_attempt(trial, self.seed_hyp) for trial in own]

    @persistent
    def imported(self) -> int:
        """Return how many results of older searches were imported."""
        return sum(IMPORTED in trial.user_attrs for trial in self._trials())

    @persistent
    def progress(self) -> SearchProgress:
        """Return how far the search is."""
        self._trials()
        with understood(self._storage.where):
            return self._counts.progress(self.budget)

    @persistent
    def seconds_left(self, now: datetime) -> float | None:
        """Return the seconds until the budget is met, if the workers that train now go on; None: too early to say."""
        trials = self._trials()
        with understood(self._storage.where):
            return self._counts.seconds_left(trials, self.budget, now)

    def _trials(self) -> list[FrozenTrial]:
        """Return every trial by number, after counting what is new. They are the storage's own: not to be changed."""
        with understood(self._storage.where):
            trials = self._study.get_trials(deepcopy=False)
            self._counts.update(trials)
        return trials

    def _reap(self) -> list[FrozenTrial]:
        """End the attempts of workers that are gone; returns every trial. The study is locked."""
        trials = self._trials()
        gone = [(n, reason) for n in self._counts.running if (reason := self._watch.verdict(n))]
        for number, reason in gone:
            self._records.end(number, {"ending": str(State.LOST), "reason": reason}, TrialState.FAIL)
            # Afterwards: where the record is refused, as by a full disk, the next look comes to the same verdict.
            self._watch.revoke(number)
        return self._trials() if gone else trials

    def _claim(
        self, trials: Sequence[FrozenTrial], next_attempt: NextAttempt, worker: str
    ) -> LeasedCandidate:
        """Record the next attempt as running, in one append, and hold its lease. The study is locked."""
        number = len(trials)
        lease = self._storage.take_lease(number, worker)
        try:
            # Whole or not at all: an ask that suggests gene by gene can be killed between two of them.
            self._study.add_trial(next_attempt.trial(number, worker))
        except BaseException:
            # Not closed: where the storage had it recorded but could not say so, others take it over at once.
            lease.abandon()
            raise
        lease.keep_alive(self._rules.lease_s / 4)
        is_seed = next_attempt.attributes.get(SAMPLER) == SEED
        return LeasedCandidate(self._candidate(number, next_attempt), lease, is_seed)

    def _candidate(self, number: int, attempt: NextAttempt) -> Candidate:
        hyp, settings = split_values(attempt.values, attempt.limits)
        finalist_of, fresh_seed = attempt.attributes.get(FINALIST_OF), attempt.attributes.get(FRESH_SEED, 0)
        halving = self.plan.halving if finalist_of is None else None
        return Candidate(
            number=number,
            hyp={**self.seed_hyp, **hyp},
            settings=settings,
            directory=self.candidate_dir(number),
            resumes_from=tuple(self.candidate_dir(n) for n in attempt.ancestors),
            glances=halving.rungs if halving else (),
            train_seed=None if finalist_of is None else self._seed + 1 + fresh_seed,
            finalist_of=finalist_of,
        )

    def _end(
        self,
        held: LeasedCandidate,
        attributes: Mapping[str, Any],
        state: TrialState,
        value: float | None = None,
    ) -> bool:
        """Record the end of an attempt and give its lease back; return False if it was taken over meanwhile."""
        with self._storage.lock():
            is_mine = self._records.end_once(held.candidate.number, attributes, state, value)
            held.lease.close()
            return is_mine

    def candidate_dir(self, number: int) -> Path:
        """Return where attempt `number` writes."""
        return self.directory / "candidates" / f"{number:04d}"
