"""The hyperparameters that evolution may change, and how far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gene:
    """One hyperparameter of the search."""

    name: str
    gain: float
    """How strongly a mutation moves it; 0 keeps the parent's value."""
    lower: float
    upper: float

    def clamp(self, value: float) -> float:
        """Return `value` inside the limits, rounded to five decimals, as the classic step does."""
        return round(min(max(value, self.lower), self.upper), 5)


GENES: tuple[Gene, ...] = (
    Gene("lr0", 1, 1e-5, 0.1),
    Gene("lrf", 1, 0.01, 1.0),
    Gene("momentum", 0.3, 0.6, 0.98),
    Gene("weight_decay", 1, 0.0, 0.001),
    Gene("warmup_epochs", 1, 0.0, 5.0),
    Gene("warmup_momentum", 1, 0.0, 0.95),
    Gene("warmup_bias_lr", 1, 0.0, 0.2),
    Gene("box", 1, 0.02, 0.2),
    Gene("cls", 1, 0.2, 4.0),
    Gene("cls_pw", 1, 0.5, 2.0),
    Gene("obj", 1, 0.2, 4.0),
    Gene("obj_pw", 1, 0.5, 2.0),
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
"""The classic 29, in their order."""


def genes_of(hyp: Mapping[str, float], genes: Sequence[Gene] = GENES) -> tuple[Gene, ...]:
    """Return the genes that a search from `hyp` changes.

    A hyperparameter that `hyp` leaves out (`anchors`, unless asked for), or whose limits meet, is not searched.
    """
    return tuple(gene for gene in genes if gene.name in hyp and gene.lower < gene.upper)
