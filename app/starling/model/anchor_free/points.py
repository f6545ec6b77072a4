"""Points of the levels of an anchor-free head, and boxes as distances from a point to four sides.

Sources: FCOS (Tian et al. 2019) for points and distances, Generalized Focal Loss (arXiv 2006.04388) for distributions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BINS = 16
"""Distances of 0 to 15 cells, of which a side's distance is the expectation."""


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
