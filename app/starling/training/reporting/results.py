"""The rows of results.csv, one per epoch."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from starling.core.files.atomic import write_atomic

LOSSES = ("box", "obj", "cls")
"""Parts of the loss of a head with anchors."""
METRICS = ("metrics/precision", "metrics/recall", "metrics/mAP_0.5", "metrics/mAP_0.5:0.95")
RATES = ("x/lr0", "x/lr1", "x/lr2")


def columns_of(losses: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of results.csv for a loss of these parts."""
    train, val = ([f"{split}/{name}_loss" for name in losses] for split in ("train", "val"))
    return ("epoch", *train, *METRICS, *val, *RATES)


def fitness(map50: float, map5095: float) -> float:
    """Return the fitness that training and search maximise: 0.1 mAP50 + 0.9 mAP50-95."""
    return 0.1 * map50 + 0.9 * map5095


@dataclass(frozen=True, slots=True)
class EpochRow:
    """One epoch's figures; metrics and validation losses are NaN for an epoch without validation."""

    epoch: int
    train_losses: tuple[float, float, float]
    metrics: tuple[float, float, float, float]
    val_losses: tuple[float, float, float]
    rates: tuple[float, float, float]
    losses: tuple[str, str, str] = LOSSES
    """Names of the parts of the loss."""

    @property
    def fitness(self) -> float:
        """The value that training and search maximise: 0.1 mAP50 + 0.9 mAP50-95; NaN without validation."""
        return fitness(self.metrics[2], self.metrics[3])

    @property
    def validated(self) -> bool:
        """Whether the epoch was validated."""
        return not math.isnan(self.metrics[3])

    def values(self) -> dict[str, float]:
        """Return the values that are not NaN by column name, without the epoch."""
        flat = (*self.train_losses, *self.metrics, *self.val_losses, *self.rates)
        names = columns_of(self.losses)[1:]
        return {key: value for key, value in zip(names, flat, strict=True) if not math.isnan(value)}

    def as_list(self) -> list[float]:
        """Return the values in the order of the columns, as a checkpoint stores them."""
        return [self.epoch, *self.train_losses, *self.metrics, *self.val_losses, *self.rates]

    @classmethod
    def from_list(cls, values: Sequence[float], losses: tuple[str, str, str] = LOSSES) -> EpochRow:
        """Build from `as_list()`'s numbers and the names of the parts of the loss."""
        epoch, b, o, c, p, r, m50, m95, vb, vo, vc, x0, x1, x2 = values
        return cls(int(epoch), (b, o, c), (p, r, m50, m95), (vb, vo, vc), (x0, x1, x2), losses)


def write_results(path: Path, rows: Sequence[EpochRow]) -> None:
    """Replace results.csv by these rows; NaN is written as an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns_of(rows[0].losses if rows else LOSSES))
    for row in rows:
        figures = ("" if math.isnan(value) else f"{value:.6g}" for value in row.as_list()[1:])
        writer.writerow([row.epoch, *figures])
    write_atomic(path, text.getvalue())
