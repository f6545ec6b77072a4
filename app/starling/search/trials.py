"""A study's trials in our words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from optuna.trial import FrozenTrial, TrialState

from starling.search.outcome import METRIC_COLUMNS, Attempt, Finished, State
from starling.search.samplers.history import SAMPLER
from starling.search.samplers.proposer import SEED
from starling.search.space_file import split_values
from starling.search.trial_counts import FINALIST_OF


def as_finished(trial: FrozenTrial, seed_hyp: Mapping[str, float], again: tuple[float, ...]) -> Finished:
    """Return a finished trial; `again` is its fitness on fresh seeds."""
    attributes = trial.user_attrs
    hyp, settings = split_values(trial.params)
    return Finished(
        number=trial.number,
        hyp={**seed_hyp, **hyp},
        settings=settings,
        fitness=float(trial.value),
        # A repair of the journal may have dropped them.
        metrics=attributes.get("metrics", dict.fromkeys(METRIC_COLUMNS, math.nan)),
        worker=attributes["worker"],
        is_seed=attributes.get(SAMPLER) == SEED,
        finalist_of=attributes.get(FINALIST_OF),
        again=again,
    )


def as_attempt(trial: FrozenTrial, seed_hyp: Mapping[str, float]) -> Attempt:
    """Return any trial of this study's own."""
    attributes = trial.user_attrs
    hyp, settings = split_values(trial.params)
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
    """Return an attempt's state; one that failed without a word of ours is lost."""
    match trial.state:
        case TrialState.COMPLETE:
            return State.FINISHED
        case TrialState.PRUNED:
            return State.PRUNED
        case TrialState.FAIL:
            return State(trial.user_attrs.get("ending", State.LOST))
    return State.RUNNING


def ancestors_of(trials: Sequence[FrozenTrial], trial: FrozenTrial) -> list[int]:
    """Return the numbers of `trial` and of the attempts that it continued, newest first.

    Raises ValueError for one that continues a later attempt, or itself: the way back would have no end.
    """
    numbers = [trial.number]
    while (before := trials[numbers[-1]].user_attrs.get("retry_of")) is not None:
        if not 0 <= before < numbers[-1]:
            raise ValueError(f"candidate {numbers[-1]} says that it continues candidate {before}")
        numbers.append(before)
    return numbers
