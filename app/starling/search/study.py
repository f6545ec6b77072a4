"""The study: one budget, one numbering, one list of candidates for all workers of a search."""

from __future__ import annotations

import enum
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from starling.core.errors import ConfigError, UsageError
from starling.core.settings.train import DEFAULT_SAMPLER, Sampler
from starling.errors import Pruned
from starling.search.outcome import (
    Attempt,
    Candidate,
    Finished,
    LeaseLost,
    Outcome,
    Progress,
    SearchFailed,
    State,
)
from starling.search.plan import FRESH_SEEDS, StudyPlan
from starling.search.samplers.history import SAMPLER
from starling.search.samplers.proposer import SEED, Proposer
from starling.search.space_file import Space, split_values
from starling.search.spec import check_version, define, describe_difference
from starling.search.storage.journal import JOURNAL, understood
from starling.search.storage.leases import Lease
from starling.search.storage.storage import StudyStorage, open_storage, persistent
from starling.search.trial_counts import FINALIST_OF, FRESH_SEED, IMPORTED, TrialCounts
from starling.search.trials import ancestors_of, as_attempt, as_finished

_DEFINITION, _BUDGET, _UUID, _TRAINING = "definition", "budget", "uuid", "training"


class Turn(enum.Enum):
    """What a worker that got no candidate is to do."""

    WAIT = "wait"
    """Others train the last candidates; one may have to be taken over."""
    DONE = "done"
    """The budget is used up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyRules:
    """How patient the workers of a study are."""

    lease_s: float = 120.0
    """Seconds without a sign of life after which a worker counts as gone."""
    max_retries: int = 2
    """Times that a candidate is tried again after its worker was lost; a finalist's repetition as often as it takes."""
    spare_failures: int = 5
    """Failed candidates beyond the budget at which the search gives up."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.lease_s > 0:
            raise ConfigError("lease_s", self.lease_s, "must be above 0 seconds")
        if self.max_retries < 0:
            raise ConfigError("max_retries", self.max_retries, "must be 0 or above")
        if self.spare_failures < 0:
            raise ConfigError("spare_failures", self.spare_failures, "must be 0 or above")


@dataclass(frozen=True, slots=True)
class Claim:
    """A candidate that this worker holds the lease of."""

    candidate: Candidate
    lease: Lease
    is_seed: bool
    """Whether it trains the hyp that the search started from."""


@dataclass(frozen=True, slots=True)
class _NextUp:
    """What an attempt that is about to begin trains."""

    params: dict[str, Any]
    space: dict[str, Any]
    attributes: dict[str, Any] = field(default_factory=dict)
    curve: dict[int, float] = field(default_factory=dict)
    """Fitness on the way, of the attempt that it continues."""
    ancestors: Sequence[int] = ()
    """Numbers of the attempts that it continues, newest first."""


class SearchStudy:
    """A worker's view of the study."""

    def __init__(
        self,
        directory: Path,
        storage: StudyStorage,
        study: optuna.Study,
        definition: Mapping[str, Any],
        rules: StudyRules,
        monotonic: Callable[[], float],
        proposer: Proposer | None = None,
    ) -> None:
        self.directory = directory
        self.seed_hyp: dict[str, float] = dict(definition["hyp"])
        self.signature: dict[str, Any] = dict(definition["signature"])
        """What the fitness depends on besides the hyp, as it was given when the study began."""
        self.uuid = str(study.user_attrs.get(_UUID, ""))
        """The search's own id, the same for all workers; its candidates' runs are children of it."""
        self._storage = storage
        self._study = study
        self._rules = rules
        self._proposer = proposer
        self.plan = StudyPlan.from_mapping(definition["plan"])
        self._seed = int(definition["seed"])
        self._counts = TrialCounts(rules.max_retries, self.plan)
        self._study_id = storage.optuna.get_study_id_from_name(study.study_name)
        self._watch = storage.watch(rules.lease_s, monotonic)
        self._unconfirmed: int | None = None
        """Number of an attempt whose end may have been recorded although the storage did not say so."""
        # The first look at a large study takes a while: now, and not while the first ask keeps all others waiting.
        trials = self._trials()
        if proposer is not None:
            with understood(storage.where):
                proposer.read(trials)

    @classmethod
    def open_or_create(
        cls,
        directory: Path,
        *,
        seed_hyp: Mapping[str, float | None],
        budget: int,
        study_seed: int,
        signature: Mapping[str, Any],
        plan: StudyPlan | None = None,
        storage: StudyStorage | None = None,
        space: Space | None = None,
        seed_settings: Mapping[str, int | str] | None = None,
        sampler: Sampler = DEFAULT_SAMPLER,
        rules: StudyRules | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        new_uuid: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> Self:
        """Join the study in `directory`, or start it; any number of workers may do so at once.

        `budget` is the number of finished trainings in all; a joiner can raise it, never lower it. Where the `plan`
        cuts trainings short it is what so many of full length cost. `signature` says what the fitness depends on
        besides the hyp (data digest, configuration) and must hold JSON values. `space` is what the search changes, by
        default the classic genes; `seed_settings` are the values that its settings start from. `sampler` is this
        worker's own.

        Raises UsageError where the study was started with another hyp, seed, space, plan or signature, saying which.
        """
        if budget < 1:
            raise ConfigError("evolve", budget, "must be at least 1 finished training")
        hyp = {key: float(value) for key, value in seed_hyp.items() if value is not None}
        space = (space or Space()).starting_from(hyp)
        definition = define(
            seed=study_seed, hyp=hyp, plan=plan or StudyPlan(), space=space, signature=signature
        )
        proposer = Proposer.of(sampler, space, {**hyp, **(seed_settings or {})}, study_seed)
        directory = directory.absolute()
        storage = storage or open_storage("", directory)
        with storage.lock(), understood(storage.where):
            study = _load_or_create(storage)
            attributes = study.user_attrs
            if _UUID not in attributes:
                study.set_user_attr(_UUID, new_uuid())
            there = attributes.get(_DEFINITION)
            if there is None:
                study.set_user_attr(_DEFINITION, definition)
            elif there != definition:
                check_version(directory, there)
                raise UsageError(describe_difference(directory, there, definition))
            if budget > attributes.get(_BUDGET, 0):
                study.set_user_attr(_BUDGET, budget)
        return cls(directory, storage, study, definition, rules or StudyRules(), monotonic, proposer)

    @classmethod
    def read(cls, directory: Path, *, url: str = "", rules: StudyRules | None = None) -> Self:
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
        if storage.study_name not in _names(storage):
            raise absent
        with understood(storage.where):
            study = optuna.load_study(study_name=storage.study_name, storage=storage.optuna)
            definition = study.user_attrs.get(_DEFINITION)
            if definition is None:
                raise absent
            check_version(directory, definition)
            return cls(directory, storage, study, definition, rules or StudyRules(), time.monotonic)

    @property
    def spans_hosts(self) -> bool:
        """Whether its workers may lack each other's folders."""
        return self._storage.spans_hosts

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

    def lock(self) -> AbstractContextManager[None]:
        """Exclude the other workers; not reentrant, and taken by ask, finish and fail themselves."""
        return self._storage.lock()

    @persistent
    def ask(self, worker: str) -> Claim | Turn:
        """Claim the next candidate: one to take over if there is, else a new one while the budget lasts.

        What has ended and what is running together never exceed the budget, so it is met exactly; where trainings
        are cut short, less than one may be left. The last part of it is the finalists', once all others have ended.

        Raises SearchFailed when so many candidates failed that more would be a waste.
        """
        with self._storage.lock():
            trials = self._reap()
            next_up = self._next_up(trials)
            if next_up is None:
                return Turn.WAIT if self._counts.running else Turn.DONE
            progress = self._progress()
            if progress.failed >= progress.budget + self._rules.spare_failures:
                raise SearchFailed(
                    f"{self.directory}: {progress.failed} candidates failed, the last with: "
                    f"{self._counts.last_reason}; correct that, then search under another --name"
                )
            return self._claim(trials, next_up, worker)

    def _next_up(self, trials: Sequence[FrozenTrial]) -> _NextUp | None:
        """Return what is to be trained next; None if nothing is left, or for now. The study is locked."""
        counts, finalists = self._counts, self.plan.finalists_of(self.budget)
        room = (self.budget * self.plan.epochs - counts.committed) // self.plan.epochs
        if room and counts.orphan is not None:
            return self._again(trials, counts.orphan)
        if room > finalists * FRESH_SEEDS:
            return self._new(trials)
        if room and not counts.exploring and (final := counts.next_final(finalists)):
            return self._final(*final)
        return None

    @persistent
    def report(self, claim: Claim, epoch: int, fitness: float) -> None:
        """Record the fitness on the way. Raises Pruned where the candidate has fallen behind, LeaseLost if it is lost."""
        number, halving = claim.candidate.number, self.plan.halving
        with self._storage.lock():
            if self._storage.optuna.get_trial(self._trial_id(number)).state is not TrialState.RUNNING:
                raise _lost(number)
            self._storage.optuna.set_trial_intermediate_value(self._trial_id(number), epoch, fitness)
        # What everything is compared with is trained to the end.
        if halving is None or claim.is_seed:
            return
        trials = self._trials()
        with understood(self._storage.where):
            reason = halving.verdict(trials, number, epoch)
        if reason:
            raise Pruned(reason, epoch)

    @persistent
    def prune(self, claim: Claim, pruned: Pruned) -> bool:
        """Record that a candidate was ended early; return False if it was taken over meanwhile."""
        return self._end_unless_lost(
            claim, {"epochs": pruned.epoch, "reason": str(pruned)}, TrialState.PRUNED
        )

    @persistent
    def correlations(self) -> dict[int, float | None]:
        """Return how well each rung foretells the end, -1 to 1; None where too few have finished to say."""
        halving, trials = self.plan.halving, self._trials()
        with understood(self._storage.where):
            return {rung: halving.correlation(trials, rung) for rung in halving.rungs} if halving else {}

    @persistent
    def finish(self, claim: Claim, outcome: Outcome) -> None:
        """Record a result. Raises LeaseLost if the candidate was taken over, CandidateFailed for a NaN fitness."""
        outcome.check()
        self._end(claim, {"metrics": outcome.metrics()}, TrialState.COMPLETE, float(outcome.fitness))

    @persistent
    def fail(self, claim: Claim, ending: State, reason: str) -> bool:
        """Record that an attempt ended without a result; return False if it was taken over meanwhile."""
        return self._end_unless_lost(claim, {"ending": str(ending), "reason": reason}, TrialState.FAIL)

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
    def progress(self) -> Progress:
        """Return how far the search is."""
        self._trials()
        with understood(self._storage.where):
            return self._progress()

    def _trials(self) -> list[FrozenTrial]:
        """Return every trial by number, after counting what is new. They are the storage's own: not to be changed."""
        with understood(self._storage.where):
            trials = self._study.get_trials(deepcopy=False)
            self._counts.update(trials)
        return trials

    def _progress(self) -> Progress:
        return Progress(
            budget=self.budget,
            finished=self._counts.finished,
            running=len(self._counts.running),
            failed=self._counts.failed,
            pruned=self._counts.pruned,
            part_trained=self._counts.part_trained,
            best_fitness=self._counts.best_fitness,
        )

    def _reap(self) -> list[FrozenTrial]:
        """End the attempts of workers that are gone; returns every trial. The study is locked."""
        trials = self._trials()
        gone = [(n, reason) for n in self._counts.running if (reason := self._watch.verdict(n))]
        for number, reason in gone:
            self._record(number, {"ending": str(State.LOST), "reason": reason}, TrialState.FAIL, None)
            # Afterwards: where the record is refused, as by a full disk, the next look comes to the same verdict.
            self._watch.revoke(number)
        return self._trials() if gone else trials

    def _claim(self, trials: Sequence[FrozenTrial], next_up: _NextUp, worker: str) -> Claim:
        """Record the next attempt as running, in one append, and hold its lease. The study is locked."""
        number = len(trials)
        attributes = {"worker": worker, "root": number, **next_up.attributes}
        lease = self._storage.take_lease(number, worker)
        try:
            # Whole or not at all: an ask that suggests gene by gene can be killed between two of them.
            self._study.add_trial(
                create_trial(
                    state=TrialState.RUNNING,
                    params=next_up.params,
                    distributions=next_up.space,
                    intermediate_values=next_up.curve,
                    user_attrs=attributes,
                )
            )
        except BaseException:
            # Not closed: where the storage had it recorded but could not say so, others take it over at once.
            lease.abandon()
            raise
        hyp, settings = split_values(next_up.params)
        finalist_of, fresh_seed = attributes.get(FINALIST_OF), attributes.get(FRESH_SEED, 0)
        halving = self.plan.halving if finalist_of is None else None
        candidate = Candidate(
            number=number,
            hyp={**self.seed_hyp, **hyp},
            settings=settings,
            directory=self.candidate_dir(number),
            resumes_from=tuple(self.candidate_dir(n) for n in next_up.ancestors),
            glances=halving.rungs if halving else (),
            train_seed=None if finalist_of is None else self._seed + 1 + fresh_seed,
            finalist_of=finalist_of,
        )
        lease.keep_alive(self._rules.lease_s / 4)
        return Claim(candidate, lease, is_seed=attributes.get(SAMPLER) == SEED)

    def _new(self, trials: Sequence[FrozenTrial]) -> _NextUp:
        """Propose a candidate."""
        assert self._proposer is not None, "opened to be read only"
        with understood(self._storage.where):
            self._proposer.read(trials)
        proposal = self._proposer.propose(len(trials), trials)
        return _NextUp(proposal.values, proposal.limits, {SAMPLER: proposal.sampler})

    def _again(self, trials: Sequence[FrozenTrial], orphan: FrozenTrial) -> _NextUp:
        """Go on with an attempt whose worker is gone."""
        before = orphan.user_attrs
        attributes = {key: before[key] for key in ("root", SAMPLER, FINALIST_OF, FRESH_SEED) if key in before}
        attributes["retry_of"] = orphan.number
        with understood(self._storage.where):
            attributes["lost_before"] = before.get("lost_before", 0) + (before["ending"] == State.LOST)
            ancestors = ancestors_of(trials, orphan)
        return _NextUp(orphan.params, orphan.distributions, attributes, orphan.intermediate_values, ancestors)

    def _final(self, finalist: FrozenTrial, fresh_seed: int) -> _NextUp:
        """Train a candidate once more."""
        attributes = {FINALIST_OF: finalist.number, FRESH_SEED: fresh_seed}
        return _NextUp(finalist.params, finalist.distributions, attributes)

    def _end_unless_lost(self, claim: Claim, attributes: Mapping[str, Any], state: TrialState) -> bool:
        try:
            self._end(claim, attributes, state, None)
        except LeaseLost:
            return False
        return True

    def _end(
        self, claim: Claim, attributes: Mapping[str, Any], state: TrialState, value: float | None
    ) -> None:
        number = claim.candidate.number
        with self._storage.lock():
            # The study decides, not the lease: an attempt that nobody ended is this worker's still.
            there = self._storage.optuna.get_trial(self._trial_id(number)).state
            # Only the connection broke after it was recorded, when this was called before.
            done = there is state and self._unconfirmed == number
            if there is not TrialState.RUNNING and not done:
                claim.lease.close()
                raise _lost(number)
            self._unconfirmed = number
            if not done:
                self._record(number, attributes, state, value)
            self._unconfirmed = None
            claim.lease.close()

    def _record(
        self, number: int, attributes: Mapping[str, Any], state: TrialState, value: float | None
    ) -> None:
        """Write attributes, then the state: an attempt that has ended always says how. The study is locked."""
        for key, item in attributes.items():
            self._storage.optuna.set_trial_user_attr(self._trial_id(number), key, item)
        self._study.tell(number, values=value, state=state)

    def _trial_id(self, number: int) -> int:
        return self._storage.optuna.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def candidate_dir(self, number: int) -> Path:
        """Return where attempt `number` writes."""
        return self.directory / "candidates" / f"{number:04d}"


def _lost(number: int) -> LeaseLost:
    return LeaseLost(f"candidate {number} was taken over by another worker")


def _load_or_create(storage: StudyStorage) -> optuna.Study:
    name = storage.study_name
    if name in _names(storage):
        return optuna.load_study(study_name=name, storage=storage.optuna)
    return optuna.create_study(study_name=name, storage=storage.optuna, direction="maximize")


def _names(storage: StudyStorage) -> list[str]:
    return [study.study_name for study in storage.optuna.get_all_studies()]
