"""A study's trials: their attributes, the next attempt, and the conversion to Finished and Attempt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from starling.search.outcome import Attempt, Finished, LeaseLost, State
from starling.search.space import Value, split_values

IMPORTED = "imported"
"""User attribute of a trial with an imported result: file and line of the result."""
SAMPLER = "sampler"
"""User attribute: name of the sampler that proposed the values."""
SEED = "seed"
"""Value of the attribute `sampler` for the hyp that the search started from."""
FINALIST_OF, FRESH_SEED = "finalist_of", "fresh_seed"
"""User attributes of a trial that trains a candidate again: its number, and the number of the fresh seed."""


@dataclass(frozen=True, slots=True)
class NextAttempt:
    """The values and the origin of an attempt that is about to begin."""

    values: Mapping[str, Value]
    limits: Mapping[str, BaseDistribution]
    attributes: dict[str, Any]
    curve: Mapping[int, float] = field(default_factory=dict)
    """Fitness by epochs, of the attempt that this one continues."""
    ancestors: Sequence[int] = ()
    """Numbers of the attempts that this one continues, newest first."""

    @classmethod
    def continuing(cls, trials: Sequence[FrozenTrial], orphan: FrozenTrial) -> Self:
        """Return the attempt that continues an interrupted one."""
        before = orphan.user_attrs
        attributes = {key: before[key] for key in ("root", SAMPLER, FINALIST_OF, FRESH_SEED) if key in before}
        attributes["retry_of"] = orphan.number
        attributes["lost_before"] = before.get("lost_before", 0) + (before["ending"] == State.LOST)
        return cls(
            orphan.params,
            orphan.distributions,
            attributes,
            orphan.intermediate_values,
            ancestors_of(trials, orphan),
        )

    @classmethod
    def repeating(cls, finalist: FrozenTrial, fresh_seed: int) -> Self:
        """Return the attempt that trains a finalist again on a fresh seed."""
        attributes = {FINALIST_OF: finalist.number, FRESH_SEED: fresh_seed}
        return cls(finalist.params, finalist.distributions, attributes)

    def trial(self, number: int, worker: str) -> FrozenTrial:
        """Return the running trial to add to the study as `number`."""
        return create_trial(
            state=TrialState.RUNNING,
            params=dict(self.values),
            distributions=dict(self.limits),
            intermediate_values=dict(self.curve),
            user_attrs={"worker": worker, "root": number, **self.attributes},
        )


def as_finished(trial: FrozenTrial, seed_hyp: Mapping[str, float], again: tuple[float, ...]) -> Finished:
    """Return a finished trial as Finished; `again` is its fitness on fresh seeds."""
    attributes = trial.user_attrs
    hyp, settings = split_values(trial.params, trial.distributions)
    return Finished(
        number=trial.number,
        hyp={**seed_hyp, **hyp},
        settings=settings,
        fitness=float(trial.value),
        metrics=attributes.get("metrics", {}),  # a repair of the journal may have dropped them
        worker=attributes["worker"],
        is_seed=attributes.get(SAMPLER) == SEED,
        finalist_of=attributes.get(FINALIST_OF),
        again=again,
    )


def as_attempt(trial: FrozenTrial, seed_hyp: Mapping[str, float]) -> Attempt:
    """Return any trial of this search (not an imported one) as Attempt."""
    attributes = trial.user_attrs
    hyp, settings = split_values(trial.params, trial.distributions)
    return Attempt(
        number=trial.number,
        root=attributes["root"],
        state=_state_of(trial),
        hyp={**seed_hyp, **hyp},
        settings=settings,
        worker=attributes["worker"],
        began=trial.datetime_start,
        ended=trial.datetime_complete,
        fitness=float(trial.value) if trial.state is TrialState.COMPLETE else None,
        metrics=attributes.get("metrics", {}),
        curve=dict(sorted(trial.intermediate_values.items())),
        reason=str(attributes.get("reason", "")),
        epochs=attributes.get("epochs"),
        finalist_of=attributes.get(FINALIST_OF),
    )


def _state_of(trial: FrozenTrial) -> State:
    """Return an attempt's state; a failed trial without a recorded ending is lost."""
    match trial.state:
        case TrialState.COMPLETE:
            return State.FINISHED
        case TrialState.PRUNED:
            return State.PRUNED
        case TrialState.FAIL:
            return State(trial.user_attrs.get("ending", State.LOST))
    return State.RUNNING


def ancestors_of(trials: Sequence[FrozenTrial], trial: FrozenTrial) -> list[int]:
    """Return the numbers of `trial` and of the attempts that it continues, newest first.

    Raises ValueError if an attempt continues a later attempt or itself, because the search would not end.
    """
    numbers = [trial.number]
    while (before := trials[numbers[-1]].user_attrs.get("retry_of")) is not None:
        if not 0 <= before < numbers[-1]:
            raise ValueError(f"candidate {numbers[-1]} says that it continues candidate {before}")
        numbers.append(before)
    return numbers


class TrialRecords:
    """The trials of one study in its storage, by number. Callers hold the study's lock."""

    def __init__(self, storage: BaseStorage, study: optuna.Study) -> None:
        self._storage, self._study = storage, study
        self._study_id = storage.get_study_id_from_name(study.study_name)
        self._unconfirmed: int | None = None
        """Number of an attempt whose end may have been recorded although the storage raised an error."""

    def report(self, number: int, epoch: int, fitness: float) -> None:
        """Record the fitness of a running attempt after `epoch` epochs; raises LeaseLost if the attempt has ended."""
        if self._state(number) is not TrialState.RUNNING:
            raise LeaseLost(number)
        self._storage.set_trial_intermediate_value(self._id(number), epoch, fitness)

    def end(
        self, number: int, attributes: Mapping[str, Any], state: TrialState, value: float | None = None
    ) -> None:
        """Write the attributes, then the state: an ended attempt always has its attributes."""
        for key, item in attributes.items():
            self._storage.set_trial_user_attr(self._id(number), key, item)
        self._study.tell(number, values=value, state=state)

    def end_once(
        self, number: int, attributes: Mapping[str, Any], state: TrialState, value: float | None = None
    ) -> bool:
        """End an attempt of this worker; return False if another worker has ended it.

        The study decides, not the lease: an attempt without an end is still this worker's. If the connection broke
        after the end was recorded, a second call finds the end recorded and returns True.
        """
        there = self._state(number)
        recorded = there is state and self._unconfirmed == number
        if there is not TrialState.RUNNING and not recorded:
            return False
        self._unconfirmed = number
        if not recorded:
            self.end(number, attributes, state, value)
        self._unconfirmed = None
        return True

    def _state(self, number: int) -> TrialState:
        return self._storage.get_trial(self._id(number)).state

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
