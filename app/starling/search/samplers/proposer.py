"""The samplers by name, and the proposer of a study's next candidate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from optuna.trial import FrozenTrial

from starling.core.errors import ConfigError, suggest
from starling.search.samplers.base import History, Sampler
from starling.search.samplers.classic import ClassicSampler
from starling.search.samplers.fast import FastSampler
from starling.search.samplers.gaussian import GaussianSampler
from starling.search.samplers.random_qmc import QmcSampler, RandomSampler
from starling.search.space import Space, Values
from starling.search.trials import SAMPLER, SEED, NextAttempt

SAMPLERS: dict[str, type[ClassicSampler | FastSampler | RandomSampler | QmcSampler | GaussianSampler]] = {
    "classic": ClassicSampler,
    "fast": FastSampler,
    "random": RandomSampler,
    "qmc": QmcSampler,
    "gp": GaussianSampler,
}


def make_sampler(name: str, space: Space, seed: Values, study_seed: int) -> Sampler:
    """Return the sampler with that name for a study; raises ConfigError if there is none.

    `space` is the searched space; `seed` has the start values of its axes.
    """
    if name not in SAMPLERS:
        raise ConfigError("--sampler", name, f"is none of {', '.join(SAMPLERS)}{suggest(name, SAMPLERS)}")
    return SAMPLERS[name](space, seed, study_seed)


class Proposer:
    """Proposes the hyp that the search starts from as the first candidate, and then the proposals of the sampler."""

    def __init__(self, space: Space, seed: Values, name: str, sampler: Sampler) -> None:
        self._space, self._name, self._sampler = space, name, sampler
        self._seed = {axis: seed[axis] for axis in space.names}
        self._known = History(space)

    @classmethod
    def of(cls, name: str, space: Space, seed: Values, study_seed: int) -> Self:
        """Return the proposer of a worker with the sampler `name`."""
        return cls(space, seed, name, make_sampler(name, space, seed, study_seed))

    def read(self, trials: Sequence[FrozenTrial]) -> None:
        """Read the new trials in `trials`, which holds every trial of the study by number."""
        self._known.update(trials)

    def propose(self, number: int, trials: Sequence[FrozenTrial]) -> NextAttempt:
        """Return candidate `number` of a study whose trials so far are `trials`, by number."""
        self.read(trials)
        if not self._known.begun:
            return NextAttempt(self._seed, self._space.distributions(self._seed), {SAMPLER: SEED})
        values = self._sampler.propose(number, self._known)
        return NextAttempt(values, self._space.distributions(), {SAMPLER: self._name})
