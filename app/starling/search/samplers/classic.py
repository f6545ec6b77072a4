"""The classic evolution step."""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np

from starling.search.outcome import SearchFailed
from starling.search.samplers.base import REDRAWS, History, stream
from starling.search.space import Gene, SettingGene, Space, Value, Values

MUTATION_RATE, MUTATION_SCALE = 0.8, 0.2
FACTOR_LIMITS = (0.3, 3.0)


class ClassicSampler:
    """Propose mutants of the five best finished candidates of all workers."""

    def __init__(self, space: Space, seed: Values, study_seed: int) -> None:
        self._space, self._seed, self._study_seed = space, seed, study_seed

    def propose(self, number: int, known: History) -> dict[str, Value]:
        """Return a mutant of one of the best candidates; of the seed before a candidate has finished."""
        return propose(
            number=number,
            study_seed=self._study_seed,
            genes=self._space.genes,
            settings=self._space.settings,
            parents=known.best or [(0.0, self._seed)],
            taken=known.taken,
        )


def propose(
    *,
    number: int,
    study_seed: int,
    genes: Sequence[Gene],
    parents: Sequence[tuple[float, Values]],
    taken: Container[tuple[Value, ...]],
    settings: Sequence[SettingGene] = (),
) -> dict[str, Value]:
    """Return a mutant of one of `parents` (fitness, values) whose values, in the order of the axes, are not in `taken`.

    The same arguments give the same mutant. Raises SearchFailed if no new mutant can be found, such as if every gene
    has gain 0 or the value 0.
    """
    for redraw in range(REDRAWS):
        rng = stream(study_seed, number, redraw)
        parent = _draw_parent(rng, parents)
        factors = _draw_factors(rng, genes)
        mutant: dict[str, Value] = {
            gene.name: gene.clamp(float(parent[gene.name]) * factor)
            for gene, factor in zip(genes, factors.tolist(), strict=True)
        }
        reach = 1 + redraw / 100  # if all near choices are taken, redraws reach farther choices
        mutant |= {s.name: _neighbour(rng, s, parent[s.name], reach) for s in settings}
        if tuple(mutant.values()) not in taken:
            return mutant
    raise SearchFailed(
        f"candidate {number}: {REDRAWS} mutations gave nothing new; the hyp leaves evolution nothing to change"
    )


def _draw_parent(rng: np.random.Generator, parents: Sequence[tuple[float, Values]]) -> Values:
    """Draw one parent with weight fitness - lowest + 1e-6."""
    fitness = np.array([value for value, _ in parents])
    weights = fitness - fitness.min() + 1e-6
    return parents[int(rng.choice(len(parents), p=weights / weights.sum()))][1]


def _draw_factors(rng: np.random.Generator, genes: Sequence[Gene]) -> np.ndarray:
    """Return one factor per gene, float64 [genes], at least one of them other than 1.

    1 + gain·[rand < 0.8]·N(0, 1)·U(0, 1)·0.2, clipped to 0.3 and 3.
    """
    gains = np.array([gene.gain for gene in genes])
    factors = np.ones(len(genes))
    while gains.any() and (factors == 1).all():
        hit = rng.random(len(genes)) < MUTATION_RATE
        step = rng.standard_normal(len(genes)) * rng.random(len(genes)) * MUTATION_SCALE
        factors = np.clip(1 + gains * hit * step, *FACTOR_LIMITS)
    return factors


def _neighbour(rng: np.random.Generator, setting: SettingGene, value: Value, reach: float) -> int | str:
    """Return the parent's choice moved by round([rand < 0.8]·N(0, 1)·U(0, 1)·reach) steps along the list.

    The formula is that of the classic step, in steps of the list instead of fifths of the value: three mutants in four
    keep the choice, most others take a neighbouring choice.
    """
    hit = rng.random() < MUTATION_RATE
    step = round(float(hit * rng.standard_normal() * rng.random() * reach))
    place = setting.choices.index(value) + step  # type: ignore[arg-type]
    return setting.choices[min(max(place, 0), len(setting.choices) - 1)]
