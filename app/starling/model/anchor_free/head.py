"""The anchor-free head: for each point a distribution of the distance to each side of a box, and class scores.

Sources: Generalized Focal Loss (Li et al. 2020, arXiv 2006.04388), FCOS (Tian et al. 2019) for points and distances.
Attribute names are interface: they are the keys of the state dicts of such detectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from starling.model.blocks import Conv

BINS = 16
"""Distances of 0 to 15 cells, of which a side's distance is the expectation."""
PRIOR_BOX_BIAS = 2.0
PRIOR_OBJECTS = 5
"""Objects expected in a 640 px image before training; sets the bias of the class scores."""


class Cells(NamedTuple):
    """Points of a batch's images, the centres of the cells of all levels, row by row."""

    points_xy: Tensor
    """[N,2] pixels."""
    stride: Tensor
    """[N,1] pixels."""

    def boxes_xyxy(self, distances: Tensor) -> Tensor:
        """Return corners [...,N,4] in pixels of distances [...,N,4] left, top, right, bottom in cells."""
        low, high = distances.split(2, dim=-1)
        return torch.cat((self.points_xy - low * self.stride, self.points_xy + high * self.stride), dim=-1)

    def distances(self, boxes_xyxy: Tensor) -> Tensor:
        """Return distances [...,N,4] in cells of corners [...,N,4] in pixels."""
        low, high = boxes_xyxy.split(2, dim=-1)
        return torch.cat((self.points_xy - low, high - self.points_xy), dim=-1) / self.stride

    def of(self, index: Tensor) -> Cells:
        """Return the cells of the numbers `index` [K]."""
        return Cells(self.points_xy[index], self.stride[index])


def grid(sizes_hw: Sequence[Sequence[int]], strides: Sequence[float], device: torch.device) -> Cells:
    """Return the cells of levels of these heights and widths."""
    points, sides = [], []
    for (height, width), stride in zip(sizes_hw, strides, strict=True):
        y, x = torch.meshgrid(
            torch.arange(height, device=device, dtype=torch.float32),
            torch.arange(width, device=device, dtype=torch.float32),
            indexing="ij",
        )
        points.append((torch.stack((x, y), dim=-1).view(-1, 2) + 0.5) * stride)
        sides.append(torch.full((height * width, 1), float(stride), device=device))
    return Cells(torch.cat(points), torch.cat(sides))


def distances_of(logits: Tensor) -> Tensor:
    """Return expected distances [...,4] in cells of logits [...,64]: left, top, right, bottom, BINS each."""
    weights = logits.unflatten(-1, (4, BINS)).softmax(-1)
    return weights @ torch.arange(BINS, dtype=weights.dtype, device=weights.device)


class _Expectation(nn.Module):
    """The constant 0 to 15 as a convolution's weight, which state dicts of this head hold. It is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(BINS, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data.copy_(torch.arange(BINS, dtype=torch.float32).view(1, BINS, 1, 1))


class AnchorFreeDetect(nn.Module):
    """Predict a box and class scores for every point of every level."""

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

    @torch.no_grad()
    def _start_biases(self) -> None:
        """Start with boxes of like distances and the rare objects of a typical image (RetinaNet, section 3.3)."""
        for box, cls, stride in zip(self.cv2, self.cv3, self._strides, strict=True):
            box[-1].bias.fill_(PRIOR_BOX_BIAS)  # type: ignore[index, union-attr]
            cls[-1].bias.fill_(math.log(PRIOR_OBJECTS / self.nc / (640 / stride) ** 2))  # type: ignore[index, union-attr]
