"""How mutants are judged by what is known: the two ways of the fast sampler."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

Array = np.ndarray


def density_ratio(points: Array, good: Array, weights: Array, bad: Array, bandwidth: float) -> Array:
    """Return log(density of good / density of bad) at `points`, float [n]; all points are float [*, d].

    Both are sums of normal kernels over all axes together; `weights` [good] sum to 1, bad ones weigh alike.
    """
    above = np.full(len(bad), 1 / max(len(bad), 1))
    return _log_density(points, good, weights, bandwidth) - _log_density(points, bad, above, bandwidth)


def _log_density(points: Array, centres: Array, weights: Array, bandwidth: float) -> Array:
    """Return the logarithm of the density up to a constant, float [n]; 0 where there are no centres."""
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
    """Return what a regression expects at `points`, plus `curiosity` of its standard deviations, float [n].

    `ranked` are known points, best first: their scores are those of normal variates in that order, so that an
    outlier counts as a rank and not as a distance. `others` have no score yet and get the expected one: they leave
    the expectation as it is and take the doubt away. All are float [*, d], the origin being where the search began.

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
    """Return what `count` sorted normal variates are on average, highest first, float [count].

    Blom's approximation, "Statistical Estimates and Transformed Beta-Variables" (1958).
    """
    quantile = NormalDist().inv_cdf
    return np.array([quantile((count - rank - 0.375) / (count + 0.25)) for rank in range(count)])


def _squared_distances(one: Array, other: Array) -> Array:
    """Return the squared distance of each of `one` from each of `other`, float [n, m]."""
    squares = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1)[None, :]
    return np.maximum(squares - 2 * one @ other.T, 0)
