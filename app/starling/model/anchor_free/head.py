"""The anchor-free head: for each point a distribution of the distance to each side of a box, and class scores.

Sources: Generalized Focal Loss (Li et al. 2020, arXiv 2006.04388), FCOS (Tian et al. 2019) for points and distances.
Attribute names are interface: they are the keys of the state dicts of such detectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from starling.core.errors import UsageError
from starling.model.anchor_free.loss import AnchorFreeGains, AnchorFreeLoss
from starling.model.anchor_free.points import BINS, distances_of, grid
from starling.model.blocks import Conv
from starling.model.head import Head

PRIOR_BOX_BIAS = 2.0
PRIOR_OBJECTS = 5
"""Objects expected in a 640 px image before training; sets the bias of the class scores."""


class _Expectation(nn.Module):
    """The constant 0 to 15 as a convolution's weight, which state dicts of this head hold. It is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(BINS, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data.copy_(torch.arange(BINS, dtype=torch.float32).view(1, BINS, 1, 1))


class AnchorFreeDetect(Head):
    """Predict a box and class scores for every point of every level."""

    losses = ("box", "cls", "dfl")
    answer = "x, y, width, height in pixels, class scores"
    answer_axis = 1
    anchors_px = None

    def __init__(self, nc: int, strides: Sequence[float], channels: Sequence[int]) -> None:
        """Build for `nc` classes; one level for each stride, with its number of input channels."""
        super().__init__()
        self.nc = nc
        # Named device: a detector built on torch's meta device, to be counted, still knows its geometry.
        stride = torch.tensor(strides, dtype=torch.float32, device="cpu")
        self.register_buffer("stride", stride, persistent=False)
        self.stride: Tensor
        self._strides = tuple(float(value) for value in strides)
        box, cls = max(16, channels[0] // 4, 4 * BINS), max(channels[0], min(nc, 100))
        self.cv2 = nn.ModuleList(
            nn.Sequential(Conv(c, box, 3), Conv(box, box, 3), nn.Conv2d(box, 4 * BINS, 1)) for c in channels
        )
        self.cv3 = nn.ModuleList(
            nn.Sequential(Conv(c, cls, 3), Conv(cls, cls, 3), nn.Conv2d(cls, nc, 1)) for c in channels
        )
        self.dfl = _Expectation()
        self._start_biases()

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return raw predictions; in eval mode (decoded, raw).

        `maps` is one [B,c,h,w] a level. Raw: one [B, 64+nc, h, w] a level. Decoded: see `decode`.
        """
        raw = [
            torch.cat((box(x), cls(x)), dim=1) for box, cls, x in zip(self.cv2, self.cv3, maps, strict=True)
        ]
        return raw if self.training else (self.decode(raw), raw)

    def decode(self, raw: Sequence[Tensor]) -> Tensor:
        """Turn raw predictions into [B, all points, 5+nc] float32: xywh in pixels, objectness 1, class scores."""
        flat = torch.cat([level.flatten(2) for level in raw], dim=2).float().permute(0, 2, 1)
        distributions, logits = flat.split((4 * BINS, self.nc), dim=2)
        cells = grid([level.shape[2:] for level in raw], self._strides, flat.device)
        corners = cells.boxes_xyxy(distances_of(distributions))
        low, high = corners.split(2, dim=2)
        scores = logits.sigmoid()
        return torch.cat(((low + high) / 2, high - low, torch.ones_like(scores[..., :1]), scores), dim=2)

    def exported(self, decoded: Tensor) -> Tensor:
        """Return [B, 4+nc, points]: xywh in pixels and class scores, without the objectness that is always 1."""
        return torch.cat((decoded[..., :4], decoded[..., 5:]), dim=2).permute(0, 2, 1)

    def describe_layout(self) -> dict[str, Any]:
        """Return the number of classes."""
        return {"nc": self.nc}

    def build_loss(self, hyp: Any, image_size: int) -> AnchorFreeLoss:
        """Return box, class and distribution loss; raises UsageError for hyperparameters of an anchor-based head."""
        if hyp.dfl is None:
            raise UsageError(
                "the hyperparameters lack `dfl` and so are those of a layout with anchors, but this layout is anchor-free; "
                "give --hyp hyp.u-scratch.yaml, or a file with box, cls and dfl as there"
            )
        return AnchorFreeLoss(self._strides, self.nc, AnchorFreeGains.of(hyp)).to(self.stride.device)

    @torch.no_grad()
    def _start_biases(self) -> None:
        """Start with boxes of like distances and the rare objects of a typical image (RetinaNet, section 3.3)."""
        for box, cls, stride in zip(self.cv2, self.cv3, self._strides, strict=True):
            box[-1].bias.fill_(PRIOR_BOX_BIAS)  # type: ignore[index, union-attr]
            cls[-1].bias.fill_(math.log(PRIOR_OBJECTS / self.nc / (640 / stride) ** 2))  # type: ignore[index, union-attr]
