"""The study: one budget, one numbering, one list of candidates for all workers of a search."""

from __future__ import annotations

import enum
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from app.errors import ConfigError, UsageError
from app.search.journal import JOURNAL, understood
from app.search.leases import Lease
from app.search.ledger import Ledger
from app.search.outcome import (
    Attempt,
    Candidate,
    Finished,
    LeaseLost,
    Outcome,
    Progress,
    SearchFailed,
    State,
)
from app.search.sampler import EvolutionSampler
from app.search.storage import StudyStorage, open_storage, persistent

VERSION = 1
"""Of the records below; a study of another version is refused."""
_DEFINITION, _BUDGET, _UUID = "definition", "budget", "uuid"
_DIFFERENCES_SHOWN = 8


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
    """Times that a candidate is tried again after its worker was lost."""
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
    ) -> None:
        self.directory = directory
        self.seed_hyp: dict[str, float] = dict(definition["hyp"])
        self.uuid = str(study.user_attrs.get(_UUID, ""))
        """The search's own id, the same for all workers; its candidates' runs are children of it."""
        self._storage = storage
        self._study = study
        self._rules = rules
        self._ledger = Ledger(rules.max_retries)
        self._study_id = storage.optuna.get_study_id_from_name(study.study_name)
        self._watch = storage.watch(rules.lease_s, monotonic)
        self._unconfirmed: int | None = None
        """Number of an attempt whose end may have been recorded although the storage did not say so."""

    @classmethod
    def open_or_create(
        cls,
        directory: Path,
        *,
        seed_hyp: Mapping[str, float | None],
        budget: int,
        study_seed: int,
        signature: Mapping[str, Any],
        storage: StudyStorage | None = None,
        sampler: BaseSampler | None = None,
        rules: StudyRules | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        new_uuid: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> Self:
        """Join the study in `directory`, or start it; any number of workers may do so at once.

        `budget` is the number of finished trainings in all; a joiner can raise it, never lower it. `signature` says
        what the fitness depends on besides the hyp (data digest, configuration) and must hold JSON values.

        Raises UsageError where the study was started with another hyp, seed or signature, saying which.
        """
        if budget < 1:
            raise ConfigError("evolve", budget, "must be at least 1 finished training")
        hyp = {key: float(value) for key, value in seed_hyp.items() if value is not None}
        definition = json.loads(
            json.dumps(
                {"version": VERSION, "seed": study_seed, "hyp": hyp, "signature": dict(signature)},
                default=str,
            )
        )
        directory = directory.absolute()
        storage = storage or open_storage("", directory)
        with storage.lock():
            study = _load_or_create(storage, sampler or EvolutionSampler(hyp, study_seed))
            attributes = study.user_attrs
            if _UUID not in attributes:
                study.set_user_attr(_UUID, new_uuid())
            if _DEFINITION not in attributes:
                study.set_user_attr(_DEFINITION, definition)
            elif attributes[_DEFINITION] != definition:
                raise UsageError(_describe_difference(directory, attributes[_DEFINITION], definition))
            if budget > attributes.get(_BUDGET, 0):
                study.set_user_attr(_BUDGET, budget)
        return cls(directory, storage, study, definition, rules or StudyRules(), monotonic)

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
            return cls(directory, storage, study, definition, rules or StudyRules(), time.monotonic)

    @property
    def spans_hosts(self) -> bool:
        """Whether its workers may lack each other's folders."""
        return self._storage.spans_hosts

    @property
    @persistent
    def budget(self) -> int:
        """Finished trainings that the search is to reach."""
        return int(self._study.user_attrs.get(_BUDGET, 0))

    def lock(self) -> AbstractContextManager[None]:
        """Exclude the other workers; not reentrant, and taken by ask, finish and fail themselves."""
        return self._storage.lock()

    @persistent
    def ask(self, worker: str) -> Claim | Turn:
        """Claim the next candidate: one to take over if there is, else a new one while the budget lasts.

        Finished and running candidates together never exceed the budget, so it is met exactly.

        Raises SearchFailed when so many candidates failed that more would be a waste.
        """
        with self._storage.lock():
            trials = self._reap()
            progress = self._progress()
            if progress.finished >= progress.budget:
                return Turn.DONE
            if progress.failed >= progress.budget + self._rules.spare_failures:
                raise SearchFailed(
                    f"{self.directory}: {progress.failed} candidates failed, the last with: "
                    f"{self._ledger.last_reason}; correct that, then search under another --name"
                )
            if progress.finished + progress.running >= progress.budget:
                return Turn.WAIT
            return self._claim(trials, worker)

    @persistent
    def finish(self, claim: Claim, outcome: Outcome) -> None:
        """Record a result. Raises LeaseLost if the candidate was taken over, CandidateFailed for a NaN fitness."""
        outcome.check()
        self._end(claim, {"metrics": outcome.metrics()}, TrialState.COMPLETE, float(outcome.fitness))

    @persistent
    def fail(self, claim: Claim, ending: State, reason: str) -> None:
        """Record that an attempt ended without a result; nothing to do if it was taken over meanwhile."""
        try:
            self._end(claim, {"ending": str(ending), "reason": reason}, TrialState.FAIL, None)
        except LeaseLost:
            return

    @persistent
    def finished(self) -> list[Finished]:
        """Return the finished candidates in the order of their numbers."""
        with understood(self._storage.where):
            return [
                self._as_finished(trial) for trial in self._trials() if trial.state is TrialState.COMPLETE
            ]

    @persistent
    def attempts(self) -> list[Attempt]:
        """Return every training that was begun, in the order of their numbers."""
        with understood(self._storage.where):
            return [self._as_attempt(trial) for trial in self._trials()]

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
            self._ledger.update(trials)
        return trials

    def _progress(self) -> Progress:
        return Progress(
            budget=self.budget,
            finished=self._ledger.finished,
            running=len(self._ledger.running),
            failed=self._ledger.failed,
            best_fitness=self._ledger.best_fitness,
        )

    def _reap(self) -> list[FrozenTrial]:
        """End the attempts of workers that are gone; returns every trial. The study is locked."""
        trials = self._trials()
        gone = [(n, reason) for n in self._ledger.running if (reason := self._watch.verdict(n))]
        for number, reason in gone:
            self._watch.revoke(number)
            self._record(number, {"ending": str(State.LOST), "reason": reason}, TrialState.FAIL, None)
        return self._trials() if gone else trials

    def _claim(self, trials: Sequence[FrozenTrial], worker: str) -> Claim:
        """Record the next attempt as running, in one append, and hold its lease. The study is locked."""
        number = len(trials)
        orphan = self._ledger.orphan
        if orphan is None:
            params, space = self._sample(number)
            attributes: dict[str, Any] = {"worker": worker, "root": number}
        else:
            params, space = orphan.params, orphan.distributions
            attributes = {
                "worker": worker,
                "root": orphan.user_attrs["root"],
                "retry_of": orphan.number,
                "lost_before": orphan.user_attrs.get("lost_before", 0)
                + (orphan.user_attrs["ending"] == State.LOST),
            }
        lease = self._storage.take_lease(number, worker)
        try:
            # Whole or not at all: an ask that suggests gene by gene can be killed between two of them.
            self._study.add_trial(
                create_trial(
                    state=TrialState.RUNNING, params=params, distributions=space, user_attrs=attributes
                )
            )
        except BaseException:
            # Not closed: where the storage had it recorded but could not say so, others take it over at once.
            lease.abandon()
            raise
        candidate = Candidate(
            number=number,
            hyp={**self.seed_hyp, **params},
            directory=self._candidate_dir(number),
            resumes_from=tuple(self._candidate_dir(n) for n in _ancestors(trials, orphan)),
        )
        lease.keep_alive(self._rules.lease_s / 4)
        return Claim(candidate, lease)

    def _sample(self, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return genes and limits of a new candidate, from the study's sampler."""
        trial = create_trial(state=TrialState.RUNNING)
        trial.number = number
        space = self._study.sampler.infer_relative_search_space(self._study, trial)
        return self._study.sampler.sample_relative(self._study, trial, space), space

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
                raise LeaseLost(f"candidate {number} was taken over by another worker")
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

    def _candidate_dir(self, number: int) -> Path:
        return self.directory / "candidates" / f"{number:04d}"

    def _as_finished(self, trial: FrozenTrial) -> Finished:
        attributes = trial.user_attrs
        return Finished(
            number=trial.number,
            hyp={**self.seed_hyp, **trial.params},
            fitness=float(trial.value),
            metrics=attributes["metrics"],
            worker=attributes["worker"],
            is_seed=attributes["root"] == 0,
        )

    def _as_attempt(self, trial: FrozenTrial) -> Attempt:
        attributes = trial.user_attrs
        return Attempt(
            number=trial.number,
            root=attributes["root"],
            state=_state_of(trial),
            hyp={**self.seed_hyp, **trial.params},
            worker=attributes["worker"],
            began=trial.datetime_start,
            ended=trial.datetime_complete,
            fitness=None if trial.value is None else float(trial.value),
            metrics=attributes.get("metrics", {}),
            curve=dict(sorted(trial.intermediate_values.items())),
            reason=str(attributes.get("reason", "")),
        )


def _state_of(trial: FrozenTrial) -> State:
    """Return an attempt's state in our words; one that failed without a word of ours is lost."""
    match trial.state:
        case TrialState.COMPLETE:
            return State.FINISHED
        case TrialState.PRUNED:
            return State.PRUNED
        case TrialState.FAIL:
            return State(trial.user_attrs.get("ending", State.LOST))
    return State.RUNNING


def _load_or_create(storage: StudyStorage, sampler: BaseSampler) -> optuna.Study:
    name = storage.study_name
    if name in _names(storage):
        return optuna.load_study(study_name=name, storage=storage.optuna, sampler=sampler)
    return optuna.create_study(study_name=name, storage=storage.optuna, sampler=sampler, direction="maximize")


def _names(storage: StudyStorage) -> list[str]:
    return [study.study_name for study in storage.optuna.get_all_studies()]


def _ancestors(trials: Sequence[FrozenTrial], trial: FrozenTrial | None) -> list[int]:
    """Return the numbers of `trial` and of the attempts that it continued, newest first."""
    numbers = []
    while trial is not None:
        numbers.append(trial.number)
        before = trial.user_attrs.get("retry_of")
        trial = None if before is None else trials[before]
    return numbers


def _describe_difference(directory: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return what a joiner would have searched otherwise than the study does."""
    old, new = _flatten(there), _flatten(here)
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    lines = [
        f"  {key}: {old.get(key)!r} in the study, {new.get(key)!r} here" for key in keys[:_DIFFERENCES_SHOWN]
    ]
    if len(keys) > _DIFFERENCES_SHOWN:
        lines.append(f"  and {len(keys) - _DIFFERENCES_SHOWN} more")
    return (
        f"{directory}: is a search for something else, and its results cannot be compared with these:\n"
        + "\n".join(lines)
        + "\nGive the same settings to join it, or another --name to start a new one."
    )


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
