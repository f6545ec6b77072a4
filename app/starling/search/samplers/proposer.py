"""What a study asks for its next candidate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from starling.core.settings.train import Sampler as Name
from starling.search.samplers.base import Sampler
from starling.search.samplers.classic import ClassicSampler
from starling.search.samplers.fast import FastSampler
from starling.search.samplers.gaussian import GaussianSampler
from starling.search.samplers.history import History
from starling.search.samplers.random_qmc import QmcSampler, RandomSampler
from starling.search.space_file import Space, Value, Values

SEED = "seed"
"""Stands in a trial for the sampler where the candidate is the seed itself."""

_KINDS: dict[Name, type[ClassicSampler | FastSampler | RandomSampler | QmcSampler | GaussianSampler]] = {
    "classic": ClassicSampler,
    "fast": FastSampler,
    "random": RandomSampler,
    "qmc": QmcSampler,
    "gp": GaussianSampler,
}


def make_sampler(name: Name, space: Space, seed: Values, study_seed: int) -> Sampler:
    """Return the sampler of that name for a study.

    `space` is what the search changes; `seed` has the values of its axes that the search starts from.
    """
    return _KINDS[name](space, seed, study_seed)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A new candidate's values, within which limits they were drawn, and by whom."""

    values: dict[str, Value]
    limits: dict[str, BaseDistribution]
    sampler: str


class Proposer:
    """The seed first, once, whoever starts; then what the sampler proposes."""

    def __init__(self, space: Space, seed: Values, name: str, sampler: Sampler) -> None:
        self._space, self._name, self._sampler = space, name, sampler
        self._seed = {axis: seed[axis] for axis in space.names}
        self._known = History(space)

    @classmethod
    def of(cls, name: Name, space: Space, seed: Values, study_seed: int) -> Self:
        """Return the proposer of a worker that takes the sampler `name`."""
        return cls(space, seed, name, make_sampler(name, space, seed, study_seed))

    def read(self, trials: Sequence[FrozenTrial]) -> None:
        """Take into account what is new in `trials`, which holds every trial of the study by number."""
        self._known.update(trials)

    def propose(self, number: int, trials: Sequence[FrozenTrial]) -> Proposal:
        """Return candidate `number` of a study whose trials so far are `trials`, by number."""
        self.read(trials)
        if not self._known.begun:
            return Proposal(dict(self._seed), self._space.distributions(self._seed), SEED)
        values = self._sampler.propose(number, self._known)
        return Proposal(values, self._space.distributions(), self._name)
