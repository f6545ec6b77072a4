"""The loss of the anchor-free head: CIoU boxes, classes weighted by alignment, distributions of distances.

Sources: TOOD (arXiv 2108.07755) for the assignment, Generalized Focal Loss (arXiv 2006.04388) for the distributions,
Zheng et al. 2020 for CIoU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from starling.boxes.geometry import iou_aligned_xywh, xywh_to_xyxy, xyxy_to_xywh
from starling.model.anchor_free.assignment import Assignment, assign
from starling.model.anchor_free.points import BINS, Cells, distances_of, grid
from starling.model.loss import Loss, Share, check_gains

_LAST_BIN = BINS - 1 - 0.01
"""The largest distance in cells that two neighbouring bins can express."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchorFreeGains:
    """The hyperparameters of the loss."""

    box: float = 7.5
    cls: float = 0.5
    dfl: float = 1.5

    def __post_init__(self) -> None:
        """Check that the values are in the ranges of the formulas."""
        check_gains(self)

    @classmethod
    def of(cls, hyp: Any) -> Self:
        """Return the gains of `hyp` (attributes by the field names)."""
        return cls(**{field.name: float(getattr(hyp, field.name)) for field in fields(cls)})


class AnchorFreeLoss(Loss):
    """Box, class and distribution loss of raw predictions against targets.

    `strides` are those of the head. Hold it on the device of the predictions (`.to(device)`).
    """

    def __init__(self, strides: Sequence[float], nc: int, gains: AnchorFreeGains) -> None:
        super().__init__()
        self.strides, self.nc = tuple(float(stride) for stride in strides), nc
        self.register_buffer("_values", torch.zeros(len(fields(AnchorFreeGains))), persistent=False)
        self._values: Tensor
        self.set_gains(gains)

    def set_gains(self, gains: AnchorFreeGains) -> None:
        """Replace the gains in place; captured graphs see the new ones."""
        self._values.copy_(torch.tensor(astuple(gains)))

    def forward(
        self, predictions: Sequence[Tensor], targets: Tensor, share: Share | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (scalar loss times batch size, [3] box, class, distribution loss after gains, detached).

        `predictions` is one raw [B, 64+nc, h, w] a level; `targets` [n,6] image in batch, class, xywhn. A row with an
        image index below 0 is padding. Computes in float32 whatever autocast says. With a `share`, both results are
        this process's addends: means are taken over the target scores of the whole batch.
        """
        with torch.autocast(predictions[0].device.type, enabled=False):
            box, cls, dfl = self._parts(predictions, targets.to(self._values), share)
            parts = torch.stack((box, cls, dfl)) * self._values
            images = predictions[0].shape[0] if share is None else share.images
            return parts.sum() * images, parts.detach()

    def assign(self, flat: Flat, targets: Tensor) -> Assignment:
        """Return which points learn which target [n,6], and how strongly; no gradient."""
        return assign(
            flat.cells.boxes_xyxy(distances_of(flat.distributions.detach())),
            flat.logits.detach().sigmoid(),
            flat.cells.points_xy,
            targets,
            flat.in_pixels(targets),
            least_side=self.strides[min(1, len(self.strides) - 1)],
        )

    def target_scores(self, flat: Flat, assigned: Assignment, targets: Tensor) -> Tensor:
        """Return [B,N,nc] what the class scores are to learn: each point's weight at the class of its target."""
        kind = targets[:, 1].long().clamp(0, self.nc - 1)[assigned.target]
        wanted = torch.zeros_like(flat.logits).flatten()
        wanted.index_add_(0, assigned.point * self.nc + kind, assigned.weight)
        return wanted.view_as(flat.logits)

    def _parts(
        self, predictions: Sequence[Tensor], targets: Tensor, share: Share | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        flat = Flat.of(predictions, self.strides, self.nc)
        assigned = self.assign(flat, targets)
        total = assigned.weight.sum()
        total = (total if share is None else share.pool(total)).clamp(min=1)
        wanted = self.target_scores(flat, assigned, targets).detach()
        cls = F.binary_cross_entropy_with_logits(flat.logits, wanted, reduction="sum")

        # Only points that may be positive; those that are not stay in place with weight 0.
        chosen = flat.distributions.reshape(-1, 4 * BINS).index_select(0, assigned.point)
        near = flat.cells.of(assigned.point % len(flat.cells.points_xy))
        target_xyxy = flat.in_pixels(targets)[assigned.target]
        predicted = near.boxes_xyxy(distances_of(chosen))
        iou = iou_aligned_xywh(xyxy_to_xywh(predicted), xyxy_to_xywh(target_xyxy), kind="ciou")
        box = ((1 - iou) * assigned.weight).sum()
        dfl = (_distribution_loss(chosen, near.distances(target_xyxy)) * assigned.weight).sum()
        return box / total, cls / total, dfl / total


class Flat(NamedTuple):
    """Raw predictions of all levels in one row of points."""

    distributions: Tensor
    """[B,N,64] logits: left, top, right, bottom, BINS each."""
    logits: Tensor
    """[B,N,nc] of the class scores."""
    cells: Cells
    image_hw: tuple[float, float]
    """Pixels of the input."""

    @classmethod
    def of(cls, predictions: Sequence[Tensor], strides: Sequence[float], nc: int) -> Flat:
        """Join raw predictions, one [B, 64+nc, h, w] a level, in float32."""
        flat = torch.cat([level.flatten(2) for level in predictions], dim=2).float().permute(0, 2, 1)
        distributions, logits = flat.split((4 * BINS, nc), dim=2)
        height, width = (side * strides[0] for side in predictions[0].shape[2:])
        cells = grid([level.shape[2:] for level in predictions], strides, flat.device)
        return cls(distributions, logits, cells, (height, width))

    def in_pixels(self, targets: Tensor) -> Tensor:
        """Return the corners [n,4] of targets [n,6] in pixels.

        Sizes enter as numbers of the host: a tensor made of them would be copied to the device and waited for.
        """
        height, width = self.image_hw
        x, y, w, h = targets[:, 2:].unbind(1)
        return xywh_to_xyxy(torch.stack((x * width, y * height, w * width, h * height), dim=1))


def _distribution_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Return [K] cross entropy to the two bins beside each distance, weighted linearly, the mean over the sides.

    `logits` [K,64], `distances` [K,4] in cells. Source: equation 6 of Generalized Focal Loss.
    """
    distances = distances.clamp(0, _LAST_BIN)
    low = distances.long()
    part = distances - low
    logs = logits.view(-1, 4, BINS).log_softmax(-1)
    near = logs.gather(2, low[..., None])[..., 0]
    far = logs.gather(2, low[..., None] + 1)[..., 0]
    return -(near * (1 - part) + far * part).mean(-1)
