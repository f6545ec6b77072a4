"""AutoAnchor: find anchor sizes that fit the labels, by k-means and then evolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]

ENOUGH_RECALL = 0.98
"""Best possible recall above which anchors are kept."""
SMALLEST_SIDE = 2.0
"""Minimum side of an anchor in pixels; labels with both sides below it are ignored."""
CLUSTERING_ROUNDS = 30
GENERATIONS = 1000
MUTATION_PROBABILITY = 0.9
MUTATION_SIGMA = 0.1
MUTATION_LIMITS = (0.3, 3.0)
SAMPLE = 20_000
"""Maximum number of labels for k-means and evolution; more only take more time. All labels judge the result."""
_CHUNK = 100_000


@dataclass(frozen=True, slots=True)
class Fit:
    """How well anchors fit labels."""

    recall: float
    """Best possible recall: the share of labels that fit at least one anchor."""
    fitness: float
    """Mean over labels of the similarity to the best anchor, counted as 0 if it is below 1/anchor_t."""


@dataclass(frozen=True, slots=True)
class AutoAnchor:
    """The decision of AutoAnchor."""

    anchors_px: Array
    """[levels, anchors, 2] width and height, smallest first; the given anchors if no better ones were found."""
    changed: bool
    report: str
    """One line for people."""


def measure_fit(labels_wh: Array, anchors_wh: Array, anchor_t: float) -> Fit:
    """Return how well anchors [k,2] fit labels [n,2], both in pixels, n at least 1.

    The similarity of a label and an anchor is the smaller of min(ratio, 1/ratio) of their two sides; they fit if the
    similarity is above 1/anchor_t, as in the loss.
    """
    taken = likeness = 0.0
    for start in range(0, len(labels_wh), _CHUNK):
        best = np.exp(-_distances(_log(labels_wh[start : start + _CHUNK]), _log(anchors_wh)).min(axis=1))
        fits = best > 1 / anchor_t
        taken += float(fits.sum())
        likeness += float((best * fits).sum(dtype=np.float64))
    return Fit(taken / len(labels_wh), likeness / len(labels_wh))


def cluster_sizes(labels_wh: Array, count: int, rng: np.random.Generator) -> Array:
    """Return `count` typical sizes [count,2] of labels [n,2] by k-means on whitened sides (Lloyd 1982).

    The initial centres are drawn far apart (k-means++, Arthur and Vassilvitskii 2007).
    """
    spread = labels_wh.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    points = labels_wh / spread
    centres = points[rng.integers(len(points), size=1)]
    nearest = np.full(len(points), np.inf)
    while len(centres) < count:
        nearest = np.minimum(nearest, ((points - centres[-1]) ** 2).sum(axis=1))
        total = nearest.sum()
        chance = nearest / total if total > 0 else None  # all points are centres already
        centres = np.concatenate((centres, points[rng.choice(len(points), size=1, p=chance)]))
    for _ in range(CLUSTERING_ROUNDS):
        owner = ((points[:, None] - centres[None]) ** 2).sum(axis=2).argmin(axis=1)
        members = np.bincount(owner, minlength=count)
        sums = np.stack([np.bincount(owner, points[:, side], count) for side in (0, 1)], axis=1)
        # A centre that is nearest to no point stays in place.
        centres = np.where(members[:, None] > 0, sums / np.maximum(members, 1)[:, None], centres)
    return centres * spread


def evolve_anchors(labels_wh: Array, anchors_wh: Array, anchor_t: float, rng: np.random.Generator) -> Array:
    """Return anchors [k,2] at least as fit as the given ones: mutate the best so far, keep improvements."""
    labels = _log(labels_wh)

    def fitness(sizes: Array) -> float:
        best = np.exp(-_distances(labels, _log(sizes)).min(axis=1))
        return float((best * (best > 1 / anchor_t)).mean(dtype=np.float64))

    draws = (GENERATIONS, *anchors_wh.shape)
    steps = MUTATION_SIGMA * rng.standard_normal(draws) * (rng.random(draws) < MUTATION_PROBABILITY)
    best, best_fitness = anchors_wh, fitness(anchors_wh)
    for factors in np.clip(1 + steps, *MUTATION_LIMITS):
        child = np.maximum(best * factors, SMALLEST_SIDE)
        child_fitness = fitness(child)
        if child_fitness > best_fitness:
            best, best_fitness = child, child_fitness
    return best


def fit_anchors(
    labels_wh: Array, anchors_px: Array, *, anchor_t: float, seed: int, provisional: bool = False
) -> AutoAnchor:
    """Keep anchors [levels, anchors, 2] if they fit labels [n,2] well, or return as many that fit better, in pixels.

    `provisional` anchors are only placeholders: they are improved even if their recall is high.
    """
    if not len(labels_wh):
        return _kept(anchors_px, "no labels to fit anchors to")
    before = measure_fit(labels_wh, anchors_px.reshape(-1, 2), anchor_t)
    if before.recall > ENOUGH_RECALL and not provisional:
        return _kept(anchors_px, f"best possible recall {before.recall:.4f}, above {ENOUGH_RECALL}")
    count = anchors_px.shape[0] * anchors_px.shape[1]
    visible = labels_wh[(labels_wh >= SMALLEST_SIDE).any(axis=1)]
    if len(visible) < count:
        too_few = f"{len(visible)} labels of {SMALLEST_SIDE:g} px and more are too few for {count} anchors"
        return _kept(anchors_px, f"best possible recall {before.recall:.4f}, but {too_few}")
    rng = np.random.default_rng(seed)
    if len(visible) > SAMPLE:
        visible = visible[rng.choice(len(visible), SAMPLE, replace=False)]
    sizes = np.maximum(cluster_sizes(visible.astype(np.float64), count, rng), SMALLEST_SIDE)
    sizes = evolve_anchors(visible, sizes, anchor_t, rng)
    sizes = sizes[np.argsort(sizes.prod(axis=1), kind="stable")].round(2)
    after = measure_fit(labels_wh, sizes, anchor_t)
    change = (
        f"best possible recall {before.recall:.4f} -> {after.recall:.4f}, "
        f"fitness {before.fitness:.4f} -> {after.fitness:.4f}"
    )
    if after.fitness <= before.fitness:
        return _kept(anchors_px, f"{change}, no better")
    found = sizes.reshape(anchors_px.shape)
    levels = " / ".join(" ".join(f"{w:g},{h:g}" for w, h in level) for level in found)
    return AutoAnchor(found, True, f"AutoAnchor: {change}; new anchors, in pixels: {levels}")


def _kept(anchors_px: Array, why: str) -> AutoAnchor:
    return AutoAnchor(anchors_px, False, f"AutoAnchor: {why}; the anchors stay")


def _log(sizes_wh: Array) -> Array:
    # min(r, 1/r) = exp(-|log r|): with logarithms, comparing a label and an anchor takes one subtraction.
    return np.log(np.maximum(sizes_wh, 1e-6)).astype(np.float32)


def _distances(labels: Array, anchors: Array) -> Array:
    """Return [n,k]: the larger of the absolute differences in width and height, in logarithms."""
    wide = np.abs(labels[:, None, 0] - anchors[None, :, 0])
    high = np.abs(labels[:, None, 1] - anchors[None, :, 1])
    return np.maximum(wide, high, out=wide)
