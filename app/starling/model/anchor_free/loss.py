"""The loss of the anchor-free head: CIoU boxes, classes weighted by alignment, distributions of distances.

Sources: TOOD (arXiv 2108.07755) for the assignment, Generalized Focal Loss (arXiv 2006.04388) for the distributions,
Zheng et al. 2020 for CIoU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starling.boxes.geometry import iou_aligned_xywh, xywh_to_xyxy, xyxy_to_xywh
from starling.core.errors import ConfigError
from starling.model.anchor_free.assignment import assign
from starling.model.anchor_free.points import BINS, distances_of, grid
from starling.model.loss import Share

_LAST_BIN = BINS - 1 - 0.01
"""The largest distance in cells that two neighbouring bins can express."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchorFreeGains:
    """The hyperparameters of the loss."""

    box: float = 7.5
    cls: float = 0.5
    dfl: float = 1.5

    def __post_init__(self) -> None:
        """Check the ranges where the formulas hold."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < float("inf"):
                raise ConfigError(field.name, value, "must be a finite number, 0 or above")

    @classmethod
    def of(cls, hyp: Any) -> Self:
        """Return the gains of `hyp` (attributes by the field names)."""
        return cls(**{field.name: float(getattr(hyp, field.name)) for field in fields(cls)})


class AnchorFreeLoss(nn.Module):
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

    def _parts(
        self, predictions: Sequence[Tensor], targets: Tensor, share: Share | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        flat = torch.cat([level.flatten(2) for level in predictions], dim=2).float()
        distributions, logits = flat.split((4 * BINS, self.nc), dim=1)
        logits = logits.permute(0, 2, 1)  # [B,N,nc]
        distributions = distributions.permute(0, 2, 1)  # [B,N,64]
        cells = grid([level.shape[2:] for level in predictions], self.strides, flat.device)
        height, width = (side * self.strides[0] for side in predictions[0].shape[2:])
        targets_xyxy = _in_pixels(targets[:, 2:], height, width)

        assigned = assign(
            cells.boxes_xyxy(distances_of(distributions.detach())),
            logits.detach().sigmoid(),
            cells.points_xy,
            targets,
            targets_xyxy,
            least_side=self.strides[1] if len(self.strides) > 1 else self.strides[0],
        )
        total = assigned.weight.sum()
        total = (total if share is None else share.pool(total)).clamp(min=1)

        wanted = torch.zeros_like(logits).flatten()
        kind = targets[:, 1].long().clamp(0, self.nc - 1)[assigned.target]
        wanted = wanted.index_add(0, assigned.point * self.nc + kind, assigned.weight).view_as(logits)
        cls = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / total

        # Positives only: rows of weight 0 stay in place, so that shapes do not depend on values.
        points = cells.points_xy.shape[0]
        chosen = distributions.reshape(-1, 4 * BINS).index_select(0, assigned.point)
        near = cells.of(assigned.point % points)
        target_xyxy = targets_xyxy[assigned.target]
        predicted = near.boxes_xyxy(distances_of(chosen))
        iou = iou_aligned_xywh(xyxy_to_xywh(predicted), xyxy_to_xywh(target_xyxy), kind="ciou")
        box = ((1 - iou) * assigned.weight).sum() / total
        dfl = (_distribution_loss(chosen, near.distances(target_xyxy)) * assigned.weight).sum() / total
        return box, cls, dfl


def _in_pixels(boxes_xywhn: Tensor, height: float, width: float) -> Tensor:
    """Return corners [n,4] in pixels; sizes enter as numbers of the host, which costs no copy to the device."""
    x, y, w, h = boxes_xywhn.unbind(1)
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
