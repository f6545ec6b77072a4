"""Predict the fitness of any hyperparameters from a table of real trainings; see bench/search_table.py."""

from __future__ import annotations

import csv
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.model_selection import GroupKFold, cross_val_predict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "app"))

from starling.core.settings.train import TrainConfig
from starling.search.space_file import read_space

Array = NDArray[np.float64]
CLASSIC, _ = read_space(TrainConfig(evolve=1))
"""The default space of a search."""


class Landscape:
    """The predicted fitness of any hyperparameters after each epoch, fitted to the table."""

    def __init__(self, rows: Sequence[Mapping[str, str]], kind: str) -> None:
        self.kind = kind
        self.genes = [gene for gene in CLASSIC.genes if gene.name in rows[0]]
        self.epochs = sum(name.startswith("epoch") for name in rows[0])
        names = [f"epoch{number + 1}" for number in range(self.epochs)]
        # After a training diverged, its epochs have no value.
        self._curves = np.array([[float(row[name] or 0) for name in names] for row in rows])
        self._positions = np.array(
            [self._place({g.name: float(row[g.name]) for g in self.genes}) for row in rows]
        )
        self.seed = {gene.name: float(rows[0][gene.name]) for gene in self.genes}
        self._luck = _luck([row["kind"] for row in rows], self._positions, self._curves)
        self._model = _model(kind, self._positions, self._curves[:, -1]).fit(self._positions, self._curves)
        self._known: dict[tuple[float, ...], Array] = {}

    @classmethod
    def read(cls, path: Path, kind: str) -> Landscape:
        """Read a table of trainings."""
        with path.open(newline="") as file:
            return cls(sorted(csv.DictReader(file), key=lambda row: int(row["index"])), kind)

    def mean(self, hyp: Mapping[str, float]) -> Array:
        """Return the fitness after each epoch, [epochs], without luck."""
        place = tuple(self._place(hyp))
        if place not in self._known:
            self._known[place] = np.clip(self._model.predict(np.array([place]))[0], 0, 1)
        return self._known[place]

    def train(self, hyp: Mapping[str, float], random: np.random.Generator) -> Array:
        """Return the curve of one training, [epochs]: the mean, plus the luck of a real training."""
        luck = self._luck[random.integers(len(self._luck))] * random.choice((-1, 1))
        return np.clip(self.mean(hyp) + luck, 0, 1)

    def facts(self) -> dict[str, float]:
        """Return how reliable the landscape is, and the values of the seed and the best row."""
        final = self._curves[:, -1]
        # Trainings that differ only in the seed are left out together.
        _, groups = np.unique(self._positions, axis=0, return_inverse=True)
        model = _model(self.kind, self._positions, final)
        guessed = cross_val_predict(model, self._positions, final, cv=GroupKFold(10), groups=groups)
        wrong = ((guessed - final) ** 2).sum() / ((final - final.mean()) ** 2).sum()
        return {
            "trainings": len(final),
            "explained": float(1 - wrong),
            "luck": float(np.sqrt((self._luck[:, -1] ** 2).mean())),
            "seed": float(self.mean(self.seed)[-1]),
            "best": float(max(self._model.predict(self._positions)[:, -1])),
        }

    def describe(self) -> str:
        """Return the facts as a sentence."""
        facts = self.facts()
        return (
            f"landscape ({self.kind}): {facts['trainings']:.0f} trainings, {facts['explained']:.0%} of the variance of "
            f"rows not seen explained, luck ±{facts['luck']:.4f}; the seed reaches {facts['seed']:.4f}, the best row "
            f"{facts['best']:.4f}"
        )

    def _place(self, hyp: Mapping[str, float]) -> list[float]:
        return [gene.position(float(hyp[gene.name])) for gene in self.genes]


def _luck(kinds: Sequence[str], positions: Array, curves: Array) -> Array:
    """Return deviations of repeated trainings from their mean over seeds, [trainings, epochs]."""
    again = {tuple(place) for place, kind in zip(positions.tolist(), kinds, strict=True) if kind == "again"}
    parts = []
    for place in again:
        same = curves[[tuple(other) == place for other in positions.tolist()]]
        # The mean of n values is nearer to each of them than the true mean is.
        parts.append((same - same.mean(axis=0)) * np.sqrt(len(same) / (len(same) - 1)))
    return np.concatenate(parts)


def _model(kind: str, positions: Array, final: Array) -> Any:
    if kind == "forest":
        return ExtraTreesRegressor(300, min_samples_leaf=2, max_features=0.5, random_state=0, n_jobs=1)
    scales = RBF(np.full(positions.shape[1], 2.0), (0.1, 100.0))
    kernel = ConstantKernel(1.0) * scales + WhiteKernel(0.1)
    fitted = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=0, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a gene without effect has an unbounded length scale
        fitted.fit(positions, final)
    return GaussianProcessRegressor(fitted.kernel_, optimizer=None, normalize_y=True)
