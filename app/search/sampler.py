"""The classic evolution step, as a sampler of Optuna."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from app.search.genes import GENES, Gene, genes_of
from app.search.ledger import OpenTrials, Ranking
from app.search.outcome import SearchFailed

MUTATION_RATE, MUTATION_SCALE = 0.8, 0.2
FACTOR_LIMITS = (0.3, 3.0)
_REDRAWS = 1000

Values = Mapping[str, float]
"""Gene name to value."""


class EvolutionSampler(BaseSampler):
    """Propose mutants of the five best finished candidates of all workers.

    A proposal is a pure function of the study's seed, the candidate's number and the candidates so far: workers that
    ask with different numbers never share a random stream, whenever they start. Candidate 0 is `seed_hyp` itself.
    """

    def __init__(self, seed_hyp: Values, study_seed: int, genes: Sequence[Gene] = GENES) -> None:
        self._genes = genes_of(seed_hyp, genes)
        self._seed = {gene.name: float(seed_hyp[gene.name]) for gene in self._genes}
        self._study_seed = study_seed
        self._open, self._ranking = OpenTrials(), Ranking()
        self._taken: set[tuple[float, ...]] = set()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return every gene's limits, widened where the seed hyp of candidate 0 lies outside them."""
        limits = {gene.name: (gene.lower, gene.upper) for gene in self._genes}
        if trial.number == 0:
            limits = {k: (min(low, self._seed[k]), max(up, self._seed[k])) for k, (low, up) in limits.items()}
        return {name: FloatDistribution(low, up) for name, (low, up) in limits.items()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the genes of candidate `trial.number`."""
        if trial.number == 0:
            return dict(self._seed)
        self._remember(study.get_trials(deepcopy=False), trial.number)
        best = [(float(parent.value), parent.params) for parent in self._ranking.trials()]
        return propose(
            number=trial.number,
            study_seed=self._study_seed,
            genes=self._genes,
            parents=best or [(0.0, self._seed)],
            taken=self._taken,
        )

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Raise ValueError: a parameter that is not a gene of this search has nothing to evolve from."""
        raise ValueError(f"{param_name} is not a gene of this search; genes: {', '.join(self._seed)}")

    def _remember(self, trials: Sequence[FrozenTrial], asking: int) -> None:
        """Note proposals and results that are new since the last call."""
        for trial, _ in self._open.read(trials):
            values = trial.params
            if trial.number != asking and all(gene.name in values for gene in self._genes):
                self._taken.add(tuple(values[gene.name] for gene in self._genes))
            if trial.state is TrialState.COMPLETE:
                self._ranking.add(trial)


def propose(
    *,
    number: int,
    study_seed: int,
    genes: Sequence[Gene],
    parents: Sequence[tuple[float, Values]],
    taken: Container[tuple[float, ...]],
) -> dict[str, float]:
    """Return a mutant of one of `parents` (fitness, genes) whose values, in the order of genes, are not in `taken`.

    The same arguments give the same mutant. Raises SearchFailed where no new one can be found, as when every gene
    has gain 0 or stands at 0.
    """
    for redraw in range(_REDRAWS):
        rng = np.random.default_rng([study_seed, number, redraw])
        parent = _draw_parent(rng, parents)
        factors = _draw_factors(rng, genes)
        mutant = {
            gene.name: gene.clamp(parent[gene.name] * factor)
            for gene, factor in zip(genes, factors.tolist(), strict=True)
        }
        if tuple(mutant.values()) not in taken:
            return mutant
    raise SearchFailed(
        f"candidate {number}: {_REDRAWS} mutations gave nothing new; the hyp leaves evolution nothing to change"
    )


def _draw_parent(rng: np.random.Generator, parents: Sequence[tuple[float, Values]]) -> Values:
    """Draw one parent with weight fitness - lowest + 1e-6."""
    fitness = np.array([value for value, _ in parents])
    weights = fitness - fitness.min() + 1e-6
    return parents[int(rng.choice(len(parents), p=weights / weights.sum()))][1]


def _draw_factors(rng: np.random.Generator, genes: Sequence[Gene]) -> np.ndarray:
    """Return one factor a gene, float64 [genes], at least one of them other than 1.

    1 + gain·[rand < 0.8]·N(0, 1)·U(0, 1)·0.2, clipped to 0.3 and 3.
    """
    gains = np.array([gene.gain for gene in genes])
    factors = np.ones(len(genes))
    while gains.any() and (factors == 1).all():
        hit = rng.random(len(genes)) < MUTATION_RATE
        step = rng.standard_normal(len(genes)) * rng.random(len(genes)) * MUTATION_SCALE
        factors = np.clip(1 + gains * hit * step, *FACTOR_LIMITS)
    return factors
