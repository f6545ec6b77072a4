"""A sampler for few trainings, many genes and a good starting point.

The first candidates are drawn around the seed: a random point in 28 dimensions is bad in some of them. Then each
proposal is the best of many mutants of the best candidates, judged by the known results: by a regression on a few dozen
results, or by the ratio of two Parzen densities over all axes together (TPE; Bergstra et al., "Algorithms for
Hyper-Parameter Optimization", 2011). Optuna's own TPE draws all genes of a candidate anew, with a width of a fifth of
their range while few candidates are good, and finds less with a few dozen results of 28 genes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from starling.core.errors import ConfigError
from starling.search.samplers.base import History, Observation, first_new, stream
from starling.search.space import Gene, Space, Value, Values

Array = np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class FastSettings:
    """Parameters of the fast sampler. Lengths are fractions of an axis, from 0 (lower limit) to 1 (upper limit)."""

    startup: int = 6
    """Number of ended candidates before proposals use results; earlier candidates are drawn around the seed."""
    startup_share: float = 0.5
    """Probability that a start-up draw changes an axis; many change at once, because a regression separates them."""
    startup_spread: float = 0.2
    """Standard deviation of a start-up change; on a log scale over four decades, a factor of six."""
    good_share: float = 0.25
    """Share of the best ended candidates, the parents of new ones."""
    least_good: int = 3
    """Minimum number of parents: a single one may have been lucky."""
    most_good: int = 25
    """Maximum number of parents, in a search of any length."""
    share: float = 0.3
    """Probability that a mutant differs from its parent on an axis."""
    spread: float = 0.12
    """Standard deviation of the change of a mutant on an axis."""
    draws: int = 512
    """Number of mutants of which the best judged one is proposed."""
    judge: Literal["model", "density"] = "model"
    """Judge of the mutants: a regression of the scores, or the ratio of the densities of good and other candidates."""
    bandwidth: float = 0.1
    """Standard deviation of the kernels of the densities."""
    linear: float = 2.25
    """Prior variance of the regression's linear part at a start-up draw's typical distance; scores have variance 1."""
    curved: float = 1.0
    """Prior variance of the curved part of the regression."""
    reach: float = 1.0
    """Length scale of the curved part, in typical distances of start-up draws."""
    noise: float = 0.3
    """Variance of a score by chance, that is between equal trainings with different seeds."""
    curiosity: float = 0.75
    """Number of standard deviations of the regression that are added to the expected score."""
    most_findings: int = 300
    """Maximum number of results used, the best half and the latest: a proposal takes milliseconds in any search."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("startup", "least_good", "most_good", "draws", "most_findings"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be at least 1")
        for name in ("startup_share", "good_share", "share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(name, getattr(self, name), "must be above 0, at most 1")
        for name in ("startup_spread", "spread", "bandwidth", "reach", "noise"):
            if not getattr(self, name) > 0:
                raise ConfigError(name, getattr(self, name), "must be above 0")
        for name in ("linear", "curved", "curiosity"):
            if not getattr(self, name) >= 0:
                raise ConfigError(name, getattr(self, name), "must be 0 or above")


class FastSampler:
    """Propose the best judged mutant of the best candidates; while too few are known, mutants of the seed.

    Running candidates count as known, with their expected score (a constant liar for the densities), so that workers
    keep apart. Pruned candidates rank below finished ones, by epochs and then fitness; candidates that failed
    for a reason of their own rank last.
    """

    def __init__(
        self, space: Space, seed: Values, study_seed: int, settings: FastSettings | None = None
    ) -> None:
        self._space, self._study_seed = space, study_seed
        self._settings = settings or FastSettings()
        self._start = np.array([space.positions(seed)])

    def propose(self, number: int, known: History) -> dict[str, Value]:
        """Return the best judged mutant; a draw around the seed while too few candidates have ended."""
        ranked = ranking(known)
        if len(ranked) < self._settings.startup:
            return first_new(number, known, lambda redraw: self._around_seed(number, redraw))
        selected = _best_and_latest(ranked, self._settings.most_findings)
        positions = self._positions([observation.values for observation in selected])
        others = self._positions(known.open)
        return first_new(number, known, lambda redraw: self._mutant(number, redraw, positions, others))

    def _around_seed(self, number: int, redraw: int) -> Values:
        rng, settings = stream(self._study_seed, number, redraw), self._settings
        drawn = self._mutate(rng, self._start, settings.startup_share, settings.startup_spread)
        return self._space.at(drawn[0].tolist())

    def _mutant(self, number: int, redraw: int, ranked: Array, others: Array) -> Values:
        """Return the best judged of many mutants of the first rows of `ranked`, float [n, axes], best first."""
        rng, settings = stream(self._study_seed, number, redraw), self._settings
        count = math.ceil(settings.good_share * len(ranked))
        count = min(max(count, settings.least_good), settings.most_good, len(ranked))
        good = ranked[:count]
        # The best parent weighs e² times as much as the last parent.
        weights = np.exp(-2 * np.arange(count) / max(count - 1, 1))
        weights /= weights.sum()
        parents = good[rng.choice(count, settings.draws, p=weights)]
        mutants = self._mutate(rng, parents, settings.share, settings.spread)
        points = [self._features(rows) for rows in (mutants, ranked, others)]
        if settings.judge == "density":
            bad = np.concatenate([points[1][count:], points[2]])
            scores = density_ratio(points[0], points[1][:count], weights, bad, settings.bandwidth)
        else:
            origin, scale = self._features(self._start), self._typical_distance()
            points = [(rows - origin) / scale for rows in points]
            scores = expected_score(
                *points,
                linear=settings.linear,
                curved=settings.curved,
                reach=settings.reach,
                noise=settings.noise,
                curiosity=settings.curiosity,
            )
        return self._space.at(mutants[int(np.argmax(scores))].tolist())

    def _mutate(self, rng: np.random.Generator, parents: Array, share: float, spread: float) -> Array:
        """Return `parents`, float [n, axes], each changed on at least one axis; a step over a limit is reflected."""
        hit = rng.random(parents.shape) < share
        unchanged = np.flatnonzero(~hit.any(axis=1))
        hit[unchanged, rng.integers(parents.shape[1], size=len(unchanged))] = True
        moved = np.abs(parents + rng.standard_normal(parents.shape) * spread)
        moved = np.clip(np.where(moved > 1, 2 - moved, moved), 0, 1)
        anywhere = rng.random(parents.shape)
        # A setting has no near values: another choice is drawn.
        is_gene = np.array([isinstance(axis, Gene) for axis in self._space.axes])
        return np.where(hit, np.where(is_gene, moved, anywhere), parents)

    def _positions(self, candidates: Sequence[Values]) -> Array:
        rows = [self._space.positions(values) for values in candidates]
        return np.array(rows).reshape(len(rows), len(self._space.axes))

    def _features(self, positions: Array) -> Array:
        """Return the coordinates for measuring distances, float [n, features].

        A gene has its position; a setting has one coordinate per choice, so that all choices are equally far apart.
        """
        columns = []
        for axis, column in zip(self._space.axes, positions.T, strict=True):
            if isinstance(axis, Gene):
                columns.append(column)
            else:
                chosen = np.minimum((column * len(axis.choices)).astype(int), len(axis.choices) - 1)
                apart = self._settings.startup_spread / math.sqrt(2)
                columns += [apart * (chosen == choice) for choice in range(len(axis.choices))]
        return np.stack(columns, axis=1) if len(positions) else np.zeros((0, len(columns)))

    def _typical_distance(self) -> float:
        """Return the root mean square distance of start-up draws from the seed."""
        settings = self._settings
        changed = settings.startup_share * len(self._space.axes)
        return settings.startup_spread * math.sqrt(max(changed, 1.0))


def ranking(known: History) -> list[Observation]:
    """Return all ended candidates, best first: finished, then pruned by epochs and fitness, then failed."""

    def by_fitness(observation: Observation) -> tuple[float, float, int]:
        fitness = -math.inf if observation.fitness is None else observation.fitness
        return -float(observation.epochs or 0), -fitness, observation.number

    return [*sorted(known.finished, key=by_fitness), *sorted(known.pruned, key=by_fitness), *known.failed]


def _best_and_latest(ranked: Sequence[Observation], most: int) -> list[Observation]:
    """Return at most `most` of the observations, best first: the best half, and the latest of the others."""
    best, others = ranked[: most - most // 2], ranked[most - most // 2 :]
    latest = {
        observation.number
        for observation in sorted(others, key=lambda observation: -observation.number)[: most // 2]
    }
    return [*best, *(observation for observation in others if observation.number in latest)]


def density_ratio(points: Array, good: Array, weights: Array, bad: Array, bandwidth: float) -> Array:
    """Return log(density of good / density of bad) at `points`, float [n]; all points are float [*, d].

    Both densities are sums of normal kernels over all axes; `weights` [good] sum to 1, bad points have equal weights.
    """
    above = np.full(len(bad), 1 / max(len(bad), 1))
    return _log_density(points, good, weights, bandwidth) - _log_density(points, bad, above, bandwidth)


def _log_density(points: Array, centres: Array, weights: Array, bandwidth: float) -> Array:
    """Return the logarithm of the density up to a constant, float [n]; 0 without centres."""
    if not len(centres):
        return np.zeros(len(points))
    exponents = np.log(weights) - _squared_distances(points, centres) / (2 * bandwidth**2)
    highest = exponents.max(axis=1, keepdims=True)
    return highest[:, 0] + np.log(np.exp(exponents - highest).sum(axis=1))


def expected_score(
    points: Array,
    ranked: Array,
    others: Array,
    *,
    linear: float,
    curved: float,
    reach: float,
    noise: float,
    curiosity: float,
) -> Array:
    """Return the expectation of a regression at `points`, plus `curiosity` standard deviations, float [n].

    `ranked` are known points, best first: their scores are normal scores in that order, so that an outlier
    counts by its rank and not by its distance. `others` have no score yet and get the expected one: they leave
    the expectation unchanged and reduce the variance. All are float [*, d], with the seed at the origin.

    A Gaussian process with fixed parameters; linear and squared-exponential covariance, Rasmussen and Williams,
    "Gaussian Processes for Machine Learning" (2006), eq. 2.25, 2.26 and 4.9.
    """

    def covariance(one: Array, other: Array) -> Array:
        bent = np.exp(-_squared_distances(one, other) / (2 * reach**2))
        return linear * one @ other.T + curved * bent

    scores = normal_scores(len(ranked))
    own = covariance(ranked, ranked) + noise * np.eye(len(ranked))
    expected = covariance(points, ranked) @ np.linalg.solve(own, scores)
    known = np.concatenate([ranked, others])
    both = covariance(known, known) + noise * np.eye(len(known))
    cross = covariance(points, known)
    told = (cross * np.linalg.solve(both, cross.T).T).sum(axis=1)
    doubt = linear * (points**2).sum(axis=1) + curved - told
    return expected + curiosity * np.sqrt(np.maximum(doubt, 0))


def normal_scores(count: int) -> Array:
    """Return the means of `count` sorted normal variates, highest first, float [count].

    Blom's approximation, "Statistical Estimates and Transformed Beta-Variables" (1958).
    """
    quantile = NormalDist().inv_cdf
    return np.array([quantile((count - rank - 0.375) / (count + 0.25)) for rank in range(count)])


def _squared_distances(one: Array, other: Array) -> Array:
    """Return the squared distance of each of `one` from each of `other`, float [n, m]."""
    squares = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1)[None, :]
    return np.maximum(squares - 2 * one @ other.T, 0)
