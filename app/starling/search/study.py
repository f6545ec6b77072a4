"""The study of a search: one budget, one numbering, one list of candidates for all workers."""

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
"""Attributes of the study in Optuna."""


class Turn(enum.Enum):
    """What a worker without a candidate must do."""

    WAIT = "wait"
    """Wait: others train the last candidates, and one of these may have to be taken over."""
    DONE = "done"
    """Stop: the budget is used up."""


@dataclass(frozen=True, slots=True)
class LeasedCandidate:
    """A candidate, and this worker's lease of it."""

    candidate: Candidate
    lease: Lease
    is_seed: bool
    """Whether the candidate has the hyp that the search started from."""


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
        """The values that the fitness depends on besides the hyp, recorded when the study began."""
        self.uuid = str(study.user_attrs.get(_UUID, ""))
        """The id of the search, equal for all workers; the candidates' runs are its children."""
        self.spans_hosts = storage.spans_hosts
        """Whether workers of this study may have no access to each other's folders."""
        self._storage = storage
        self._study = study
        self._rules = rules
        self._proposer = proposer
        self.plan = StudyPlan.from_mapping(definition["plan"])
        self._seed = int(definition["seed"])
        self._counts = TrialCounts(rules.max_retries, self.plan)
        self._records = TrialRecords(storage.optuna, study)
        self._watch = storage.watch(rules.lease_s)
        # Reading a large study takes a while: done now, and not in the first `ask`, which locks out other workers.
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
        """Join the study in `directory`, or create it; any number of workers may do so at once.

        Raises UsageError, with the differences, if the study has another hyp, seed, space, plan or signature.
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
        """Open the study of `directory`, or of that name in the database `url`, for reading; nothing is written.

        Raises UsageError if there is no such study.
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
        """Number of trainings of full length that the search may spend."""
        with understood(self._storage.where):
            return int(self._study.user_attrs.get(_BUDGET, 0))

    @property
    @persistent
    def training(self) -> dict[str, Any]:
        """The mapping that `describe` stored; empty before."""
        with understood(self._storage.where):
            return dict(self._study.user_attrs.get(_TRAINING, {}))

    @persistent
    def describe(self, training: Mapping[str, Any]) -> None:
        """Store what the report shows of the trainings: command and numbers of images. Only the first call counts."""
        with self._storage.lock():
            if _TRAINING not in self._study.user_attrs:
                self._study.set_user_attr(_TRAINING, dict(training))

    @persistent
    def ask(self, worker: str) -> LeasedCandidate | Turn:
        """Claim the next candidate: an interrupted one if there is one, otherwise a new one while the budget lasts.

        Ended and running trainings together never exceed the budget, so that it is met exactly; with pruning, a rest of
        less than one training may remain. Finalists get the last part of the budget, after all others have ended.

        Raises SearchFailed if so many candidates have failed that going on would be a waste.
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
        """Return the next attempt; None if there is none, or none for now. The caller holds the study's lock."""
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
        """Record the fitness after `epoch` epochs. Raises Pruned if the candidate fell behind, or LeaseLost."""
        number, halving = held.candidate.number, self.plan.halving
        with self._storage.lock():
            self._records.report(number, epoch, fitness)
        # The seed is trained to the end, because everything is compared with it.
        if halving is None or held.is_seed:
            return
        trials = self._trials()
        with understood(self._storage.where):
            reason = halving.verdict(trials, number, epoch)
        if reason:
            raise Pruned(reason, epoch)

    @persistent
    def prune(self, held: LeasedCandidate, pruned: Pruned) -> bool:
        """Record that a candidate was pruned; return False if another worker has taken it over meanwhile."""
        return self._end(held, {"epochs": pruned.epoch, "reason": str(pruned)}, TrialState.PRUNED)

    @persistent
    def correlations(self) -> dict[int, float | None]:
        """Return how well each rung predicts the end, -1 to 1; None for too few finished trainings."""
        halving, trials = self.plan.halving, self._trials()
        with understood(self._storage.where):
            return {rung: halving.correlation(trials, rung) for rung in halving.rungs} if halving else {}

    @persistent
    def finish(self, held: LeasedCandidate, outcome: Outcome) -> None:
        """Record a result. Raises LeaseLost after a takeover, CandidateFailed if the fitness is not finite."""
        outcome.check()
        metrics = {"metrics": dict(outcome.metrics)}
        if not self._end(held, metrics, TrialState.COMPLETE, float(outcome.fitness)):
            raise LeaseLost(held.candidate.number)

    @persistent
    def fail(self, held: LeasedCandidate, ending: State, reason: str) -> bool:
        """Record that an attempt ended without a result; return False if another worker has taken it over meanwhile."""
        return self._end(held, {"ending": str(ending), "reason": reason}, TrialState.FAIL)

    @persistent
    def add_known(self, choose: Callable[[Sequence[FrozenTrial]], Sequence[FrozenTrial]]) -> int:
        """Append the finished trials, marked IMPORTED, that `choose` returns for all trials; return their number.

        Samplers use imported trials as parents; they are no candidates of this search and cost no budget.
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
        """Return every started training, in the order of their numbers."""
        with understood(self._storage.where):
            own = [trial for trial in self._trials() if IMPORTED not in trial.user_attrs]
            return [as_attempt(trial, self.seed_hyp) for trial in own]

    @persistent
    def imported(self) -> int:
        """Return the number of imported results of older searches."""
        return sum(IMPORTED in trial.user_attrs for trial in self._trials())

    @persistent
    def progress(self) -> SearchProgress:
        """Return the progress of the search."""
        self._trials()
        with understood(self._storage.where):
            return self._counts.progress(self.budget)

    @persistent
    def seconds_left(self, now: datetime) -> float | None:
        """Return the seconds until the budget is met, if the running workers go on; None if it is too early to say."""
        trials = self._trials()
        with understood(self._storage.where):
            return self._counts.seconds_left(trials, self.budget, now)

    def _trials(self) -> list[FrozenTrial]:
        """Return every trial by number, after counting the new ones. The storage owns them: do not change them."""
        with understood(self._storage.where):
            trials = self._study.get_trials(deepcopy=False)
            self._counts.update(trials)
        return trials

    def _reap(self) -> list[FrozenTrial]:
        """End the attempts of workers that are gone; return every trial. The caller holds the study's lock."""
        trials = self._trials()
        gone = [(n, reason) for n in self._counts.running if (reason := self._watch.verdict(n))]
        for number, reason in gone:
            self._records.end(number, {"ending": str(State.LOST), "reason": reason}, TrialState.FAIL)
            # After the record: if the record fails, as on a full disk, the next look reaches the same verdict.
            self._watch.revoke(number)
        return self._trials() if gone else trials

    def _claim(
        self, trials: Sequence[FrozenTrial], next_attempt: NextAttempt, worker: str
    ) -> LeasedCandidate:
        """Record the next attempt as running, in one append, and take its lease. The caller holds the study's lock."""
        number = len(trials)
        lease = self._storage.take_lease(number, worker)
        try:
            # One append is atomic; an ask that suggests gene by gene could be killed between two genes.
            self._study.add_trial(next_attempt.trial(number, worker))
        except BaseException:
            # Not closed: if the storage recorded the trial in spite of the error, others can take it over at once.
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
        """Record the end of an attempt and return its lease; return False if it was taken over meanwhile."""
        with self._storage.lock():
            is_mine = self._records.end_once(held.candidate.number, attributes, state, value)
            held.lease.close()
            return is_mine

    def candidate_dir(self, number: int) -> Path:
        """Return the folder of attempt `number`."""
        return self.directory / "candidates" / f"{number:04d}"
