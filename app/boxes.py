"""Boxes: frames, overlap, and non-maximum suppression.

A suffix says the frame: `_xyxy` two corners, `_xywh` centre and size, both in pixels; `_xywhn` a fraction of the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torchvision
from torch import Tensor

IouKind = Literal["iou", "giou", "diou", "ciou"]

MAX_CANDIDATES = 30_000
"""Boxes of one image that reach suppression, the most confident first."""
FIRST_CHUNK = 4
"""Suppression starts with this many times `max_detections` candidates."""
_EPS = 1e-7


def xywh_to_xyxy(boxes_xywh: Tensor) -> Tensor:
    """Turn [...,4] centre and size into corners."""
    centre, half = boxes_xywh[..., :2], boxes_xywh[..., 2:4] / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def xyxy_to_xywh(boxes_xyxy: Tensor) -> Tensor:
    """Turn [...,4] corners into centre and size."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:4]
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def xywhn_to_xyxy(boxes_xywhn: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Turn [...,4] fractions of an image of `size_hw` pixels into corners in pixels."""
    height, width = size_hw
    return xywh_to_xyxy(boxes_xywhn * boxes_xywhn.new_tensor([width, height, width, height]))


def xyxy_to_xywhn(boxes_xyxy: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Turn [...,4] corners in pixels into fractions of an image of `size_hw` pixels."""
    height, width = size_hw
    return xyxy_to_xywh(boxes_xyxy) / boxes_xyxy.new_tensor([width, height, width, height])


def iou_aligned_xywh(a_xywh: Tensor, b_xywh: Tensor, kind: IouKind = "iou") -> Tensor:
    """Return the overlap of boxes in pairs: [...,4] and [...,4] -> [...].

    GIoU: Rezatofighi et al. 2019; DIoU and CIoU: Zheng et al. 2020, the aspect's weight without gradient.
    """
    a_xy, a_wh = a_xywh[..., :2], a_xywh[..., 2:4]
    b_xy, b_wh = b_xywh[..., :2], b_xywh[..., 2:4]
    a_low, a_high = a_xy - a_wh / 2, a_xy + a_wh / 2
    b_low, b_high = b_xy - b_wh / 2, b_xy + b_wh / 2
    inter = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0).prod(-1)
    union = a_wh.prod(-1) + b_wh.prod(-1) - inter + _EPS
    iou = inter / union
    if kind == "iou":
        return iou
    hull = torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)
    if kind == "giou":
        area = hull.prod(-1) + _EPS
        return iou - (area - union) / area
    distance = (b_xy - a_xy).square().sum(-1) / (hull.square().sum(-1) + _EPS)
    if kind == "diou":
        return iou - distance
    angle = torch.atan(b_wh[..., 0] / (b_wh[..., 1] + _EPS)) - torch.atan(
        a_wh[..., 0] / (a_wh[..., 1] + _EPS)
    )
    aspect = (4 / math.pi**2) * angle.square()
    with torch.no_grad():
        alpha = aspect / (aspect - iou + (1 + _EPS))
    return iou - distance - aspect * alpha


def iou_matrix(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Return [N,M] IoU of every box of [N,4] with every box of [M,4]."""
    low = torch.maximum(a_xyxy[:, None, :2], b_xyxy[None, :, :2])
    high = torch.minimum(a_xyxy[:, None, 2:4], b_xyxy[None, :, 2:4])
    inter = (high - low).clamp(min=0).prod(-1)
    a_area = (a_xyxy[:, 2:4] - a_xyxy[:, :2]).prod(-1)
    b_area = (b_xyxy[:, 2:4] - b_xyxy[:, :2]).prod(-1)
    return inter / (a_area[:, None] + b_area[None] - inter + _EPS)


def non_max_suppression(
    predictions: Tensor,
    conf: float = 0.25,
    iou: float = 0.45,
    *,
    classes: Sequence[int] | None = None,
    agnostic: bool = False,
    multi_label: bool = False,
    max_detections: int = 300,
) -> list[Tensor]:
    """Keep the most confident of overlapping boxes: one [n,6] xyxy, confidence, class for each image.

    `predictions` is decoded [B, anchors, 5+nc]: xywh in pixels, objectness, class scores. A box whose objectness and
    whose objectness times class score exceed `conf` is a candidate: for its best class, or with `multi_label` for every
    such class. Boxes of one class (`agnostic`: of any) that overlap a more confident one by more than `iou` go.
    """
    wanted = None if classes is None else torch.tensor(sorted(set(classes)), device=predictions.device)
    found = []
    for image in predictions.float():
        boxes_xyxy, scores, labels = _candidates(image[image[:, 4] > conf], conf, multi_label)
        if wanted is not None:
            chosen = torch.isin(labels, wanted)
            boxes_xyxy, scores, labels = boxes_xyxy[chosen], scores[chosen], labels[chosen]
        order = _by_confidence(scores, MAX_CANDIDATES)
        boxes_xyxy, scores, labels = boxes_xyxy[order], scores[order], labels[order]
        groups = torch.zeros_like(labels) if agnostic else labels
        kept = _suppress(boxes_xyxy, scores, groups, iou, max_detections)
        found.append(torch.cat((boxes_xyxy[kept], scores[kept, None], labels[kept, None].float()), dim=1))
    return found


def _candidates(rows: Tensor, conf: float, multi_label: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return corners [n,4], confidences [n] and classes [n] above `conf` out of decoded rows [m,5+nc]."""
    scores = rows[:, 5:] * rows[:, 4:5]
    if multi_label and scores.shape[1] > 1:
        row, label = (scores > conf).nonzero(as_tuple=True)
        confidence = scores[row, label]
    else:
        best, label = scores.max(1) if len(rows) else (scores.new_zeros(0), scores.new_zeros(0).long())
        row = (best > conf).nonzero()[:, 0]
        confidence, label = best[row], label[row]
    return xywh_to_xyxy(rows[row, :4]), confidence, label


def _by_confidence(scores: Tensor, limit: int) -> Tensor:
    """Return indices of the `limit` highest scores in falling order; equal ones keep theirs."""
    if len(scores) <= limit:
        return scores.argsort(descending=True, stable=True)
    # Sorting only what can be among the first is several times faster than sorting all.
    high = (scores >= scores.topk(limit, sorted=False).values.min()).nonzero()[:, 0]
    return high[scores[high].argsort(descending=True, stable=True)][:limit]


def _suppress(boxes_xyxy: Tensor, scores: Tensor, groups: Tensor, iou: float, limit: int) -> Tensor:
    """Return indices of the first `limit` boxes that suppression keeps, of boxes sorted by confidence.

    What is kept among the first k depends on these k alone, so a growing head of the line is suppressed until it holds
    `limit` boxes: at low confidence that leaves most candidates untouched.
    """
    size = FIRST_CHUNK * max(limit, 1)
    while True:
        kept = torchvision.ops.batched_nms(boxes_xyxy[:size], scores[:size], groups[:size], iou)
        if len(kept) >= limit or size >= len(scores):
            return kept[:limit]
        size *= 2
