"""The hyperparameters that a search may change, and how far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DIGITS = 5
"""Digits of a proposed value within a gene's limits: more than a fitness can tell apart, and short enough to read."""


@dataclass(frozen=True, slots=True)
class Gene:
    """One hyperparameter of the search."""

    name: str
    gain: float
    """How strongly a classic mutation moves it; 0 keeps the parent's value. The other samplers do not look at it."""
    lower: float
    upper: float
    log: bool = False
    """Whether equal factors count alike, not equal differences. The classic step multiplies anyway."""

    def clamp(self, value: float) -> float:
        """Return `value` inside the limits, rounded to five decimals, as the classic step does."""
        return min(max(round(value, 5), self.lower), self.upper)

    def at(self, place: float) -> float:
        """Return the value at `place`, from 0 (lower limit) to 1 (upper limit), rounded to a readable one."""
        if place <= 0:
            return self.lower
        if place >= 1:
            return self.upper
        width = self.upper - self.lower
        if self.log:
            low, high = math.log(self.lower), math.log(self.upper)
            value = math.exp(low + (high - low) * place)
            width = min(width, value)
        else:
            value = self.lower + width * place
        rounded = round(value, DIGITS - 1 - math.floor(math.log10(width)))
        return min(max(rounded, self.lower), self.upper)

    def place(self, value: float) -> float:
        """Return where `value` lies between the limits, from 0 to 1: the inverse of `at`, but for its rounding."""
        value = min(max(value, self.lower), self.upper)
        if self.log:
            low, high = math.log(self.lower), math.log(self.upper)
            return (math.log(value) - low) / (high - low)
        return (value - self.lower) / (self.upper - self.lower)


GENES: tuple[Gene, ...] = (
    Gene("lr0", 1, 1e-5, 0.1, log=True),
    Gene("lrf", 1, 0.01, 1.0, log=True),
    Gene("momentum", 0.3, 0.6, 0.98),
    Gene("weight_decay", 1, 0.0, 0.001),
    Gene("warmup_epochs", 1, 0.0, 5.0),
    Gene("warmup_momentum", 1, 0.0, 0.95),
    Gene("warmup_bias_lr", 1, 0.0, 0.2),
    Gene("box", 1, 0.02, 0.2, log=True),
    Gene("cls", 1, 0.2, 4.0, log=True),
    Gene("cls_pw", 1, 0.5, 2.0, log=True),
    Gene("obj", 1, 0.2, 4.0, log=True),
    Gene("obj_pw", 1, 0.5, 2.0, log=True),
    Gene("iou_t", 0, 0.1, 0.7),
    Gene("anchor_t", 1, 2.0, 8.0),
    Gene("anchors", 2, 2.0, 10.0),
    Gene("fl_gamma", 0, 0.0, 2.0),
    Gene("hsv_h", 1, 0.0, 0.1),
    Gene("hsv_s", 1, 0.0, 0.9),
    Gene("hsv_v", 1, 0.0, 0.9),
    Gene("degrees", 1, 0.0, 45.0),
    Gene("translate", 1, 0.0, 0.9),
    Gene("scale", 1, 0.0, 0.9),
    Gene("shear", 1, 0.0, 10.0),
    Gene("perspective", 0, 0.0, 0.001),
    Gene("flipud", 1, 0.0, 1.0),
    Gene("fliplr", 0, 0.0, 1.0),
    Gene("mosaic", 1, 0.0, 1.0),
    Gene("mixup", 1, 0.0, 1.0),
    Gene("copy_paste", 1, 0.0, 1.0),
)
"""The classic 29, in their order; `classic.yaml` says the same."""


def genes_of(hyp: Mapping[str, float], genes: Sequence[Gene] = GENES) -> tuple[Gene, ...]:
    """Return the genes that a search from `hyp` changes.

    A hyperparameter that `hyp` leaves out (`anchors`, unless asked for), or whose limits meet, is not searched.
    """
    return tuple(gene for gene in genes if gene.name in hyp and gene.lower < gene.upper)
