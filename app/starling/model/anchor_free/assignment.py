"""Task-aligned assignment: which points learn which target, and how strongly (TOOD, Feng et al. 2021, arXiv 2108.07755).

Every shape depends on shapes alone, never on values, so that no step waits for the device. Targets go through in parts
of a bounded number of pairs with points: memory is bounded whatever the batch, the image size and the targets.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

POSITIVES = 10
"""Points that a target takes at most."""
MOST_PAIRS = 1 << 22
"""Pairs of a target and a point that are compared at once: 16 MiB for each intermediate tensor."""
_EPS = 1e-7


class Assignment(NamedTuple):
    """K = targets x POSITIVES rows of a point and its target; those that are not positive have weight 0."""

    point: Tensor
    """[K] index into the batch's points, flattened [B, N]."""
    target: Tensor
    """[K] row of the targets."""
    positive: Tensor
    """[K] bool; no point is in two positive rows."""
    weight: Tensor
    """[K] float32 target score, 0 where not positive."""


class _Best(NamedTuple):
    """The target with the largest overlap of each point, among those that the point lies inside."""

    overlap: Tensor
    """[B,N], below 0 where there is none."""
    target: Tensor
    """[B,N] row of the targets, of equal overlaps the first."""


@torch.no_grad()
def assign(
    boxes_xyxy: Tensor,
    scores: Tensor,
    points_xy: Tensor,
    targets: Tensor,
    targets_xyxy: Tensor,
    least_side: float,
) -> Assignment:
    """Assign points to targets.

    `boxes_xyxy` [B,N,4] predicted boxes and `points_xy` [N,2] in pixels; `scores` [B,N,nc] after the sigmoid; `targets`
    [n,6] image, class, box; `targets_xyxy` [n,4] in pixels. A target with an image index below 0 is padding. A target
    with a side below `least_side` pixels takes points as if the side were that long.

    A target takes its POSITIVES best points by t = s^0.5 u^6: s is the score of its class, u the CIoU with the predicted
    box, clamped at 0; only points strictly inside the target count. A point that several targets take goes to the
    target with the largest u of all that it lies inside. The weight of a positive point is t max(u) / max(t), both
    maxima over the positive points of its target.
    """
    batch, points = boxes_xyxy.shape[:2]
    image = targets[:, 0].long()
    exists = (image >= 0) & (image < batch)
    image = image.clamp(0, batch - 1)
    kind = targets[:, 1].long().clamp(0, scores.shape[2] - 1)
    taken, place, overlap, best = _take(
        boxes_xyxy, scores, points_xy, torch.stack((image, kind, exists.long())), targets_xyxy, least_side
    )
    claims = overlap.new_zeros(batch * points).index_add_(0, place, taken.to(overlap.dtype))
    contested = claims[place] > 1
    row = torch.arange(len(place), device=place.device)
    first = row.new_full((batch * points,), len(row))
    first.scatter_reduce_(0, place, torch.where(taken, row, len(row)), "amin")
    positive = taken & (row == first[place])

    own = row // max(min(POSITIVES, points), 1)
    target = torch.where(contested, best.target.flatten()[place], own)
    overlap = torch.where(contested, best.overlap.flatten()[place], overlap) * positive
    score = scores.reshape(batch * points, -1)[place, kind[target]]
    metric = _metric(score, overlap)
    highest = metric.new_zeros(len(targets)).scatter_reduce_(0, target, metric, "amax")
    widest = overlap.new_zeros(len(targets)).scatter_reduce_(0, target, overlap, "amax")
    return Assignment(place, target, positive, metric * (widest / (highest + 1e-9))[target])


def _take(
    boxes_xyxy: Tensor,
    scores: Tensor,
    points_xy: Tensor,
    of_targets: Tensor,
    targets_xyxy: Tensor,
    least_side: float,
) -> tuple[Tensor, Tensor, Tensor, _Best]:
    """Return of each target's best points whether it takes them, their places and their overlaps [K]; and `_Best`.

    `of_targets` [3,n] image, class, and whether there is such a target.
    """
    batch, points = boxes_xyxy.shape[:2]
    best = _Best(
        boxes_xyxy.new_full((batch, points), -1.0),
        torch.zeros((batch, points), dtype=torch.long, device=boxes_xyxy.device),
    )
    size = max(MOST_PAIRS // points, 1)
    found = []
    for first in range(0, targets_xyxy.shape[0], size):
        image, kind, exists = of_targets[:, first : first + size]
        corners = targets_xyxy[first : first + size]
        inside = _inside(points_xy, corners, least_side) & exists.bool()[:, None]
        overlap = torch.where(inside, _ciou(corners, boxes_xyxy, image).clamp_(min=0), -1.0)
        best = _better(best, overlap, image, first)
        metric = torch.where(inside, _metric(scores[image, :, kind], overlap), -1.0)
        metric, point = metric.topk(min(POSITIVES, points), dim=1)
        found.append((metric > 0, image[:, None] * points + point, overlap.gather(1, point)))
    if not found:
        nothing = best.target.new_zeros(0)
        return nothing.bool(), nothing, best.overlap.new_zeros(0), best
    taken, place, overlap = (torch.cat(values).flatten() for values in zip(*found, strict=True))
    return taken, place, overlap, best


def _metric(score: Tensor, overlap: Tensor) -> Tensor:
    """Return s^0.5 u^6, by products, which take a tenth of the time of a power."""
    square = overlap * overlap
    return square * square * square * score.sqrt()


def _better(best: _Best, overlap: Tensor, image: Tensor, first: int) -> _Best:
    """Return the best targets of each point after those whose `overlap` [m,N] is new; `first` is their first row."""
    where = image[:, None].expand_as(overlap)
    most = torch.full_like(best.overlap, -1.0).scatter_reduce_(0, where, overlap, "amax")
    last = first + len(image)
    row = torch.arange(first, last, device=image.device)[:, None]
    claims = torch.where(overlap == most[image], row, last)
    which = torch.full_like(best.target, last).scatter_reduce_(0, where, claims, "amin")
    better = most > best.overlap
    return _Best(torch.where(better, most, best.overlap), torch.where(better, which, best.target))


def _inside(points_xy: Tensor, targets_xyxy: Tensor, least_side: float) -> Tensor:
    """Return [m,N] bool: which points lie strictly inside which target."""
    centre = (targets_xyxy[:, :2] + targets_xyxy[:, 2:]) / 2
    half = (targets_xyxy[:, 2:] - targets_xyxy[:, :2]).clamp(min=least_side) / 2
    x, y = points_xy.unbind(1)
    low, high = centre - half, centre + half
    return (x > low[:, :1]) & (x < high[:, :1]) & (y > low[:, 1:]) & (y < high[:, 1:])


def _ciou(targets_xyxy: Tensor, boxes_xyxy: Tensor, image: Tensor) -> Tensor:
    """Return [m,N] complete IoU of each target with every box of its image (Zheng et al. 2020).

    As `iou_aligned_xywh`, with the boxes' own terms computed once for each box in place of once for each pair.
    """
    low_x, low_y, high_x, high_y = boxes_xyxy.unbind(2)
    width, height = high_x - low_x, high_y - low_y
    angle = torch.atan(width / (height + _EPS))
    t_low_x, t_low_y, t_high_x, t_high_y = (side[:, None] for side in targets_xyxy.unbind(1))
    t_width, t_height = t_high_x - t_low_x, t_high_y - t_low_y
    t_angle = torch.atan(t_width / (t_height + _EPS))

    low_x, low_y, high_x, high_y = (side[image] for side in (low_x, low_y, high_x, high_y))
    inter = (torch.minimum(high_x, t_high_x) - torch.maximum(low_x, t_low_x)).clamp_(min=0)
    inter *= (torch.minimum(high_y, t_high_y) - torch.maximum(low_y, t_low_y)).clamp_(min=0)
    union = (width * height)[image] + t_width * t_height - inter + _EPS
    iou = inter.div_(union)
    diagonal = (torch.maximum(high_x, t_high_x) - torch.minimum(low_x, t_low_x)).square_()
    diagonal += (torch.maximum(high_y, t_high_y) - torch.minimum(low_y, t_low_y)).square_()
    diagonal += _EPS
    distance = (low_x + high_x - t_low_x - t_high_x).square_()
    distance += (low_y + high_y - t_low_y - t_high_y).square_()
    distance /= diagonal.mul_(4)
    aspect = (angle[image] - t_angle).square_().mul_(4 / math.pi**2)
    alpha = aspect / (aspect - iou + (1 + _EPS))
    return iou - distance - aspect.mul_(alpha)
