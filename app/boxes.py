"""Boxes: frames, overlap, and non-maximum suppression.

A suffix says the frame: `_xyxy` two corners, `_xywh` centre and size, both in pixels; `_xywhn` a fraction of the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from app.suppression import suppress_each, suppress_together

IouKind = Literal["iou", "giou", "diou", "ciou"]

MAX_CANDIDATES = 30_000
"""Boxes of one image that reach suppression, the most confident first."""
FIRST_HEAD = 2048
"""So many of them are sorted at first."""
GROWTH = 4
"""What that number is multiplied by where these are not enough."""
IMAGES_TOGETHER = 32
"""Images that go through suppression at once, for the memory that this needs; fewer where a head is larger."""
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
    """Return [...,N,M] IoU of every box of [...,N,4] with every box of [...,M,4]."""
    a, b = a_xyxy[..., :, None, :4].unbind(-1), b_xyxy[..., None, :, :4].unbind(-1)
    width = torch.minimum(a[2], b[2]) - torch.maximum(a[0], b[0])
    height = torch.minimum(a[3], b[3]) - torch.maximum(a[1], b[1])
    inter = width.clamp_(min=0) * height.clamp_(min=0)
    a_area, b_area = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    return inter / (a_area + b_area - inter + _EPS)


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
    such class. Boxes of one class (`agnostic`: of any) that overlap a more confident one by more than `iou` go. Of
    equal confidences the first in the order of `predictions` counts as the higher.

    All images go through together, on their device, with a few synchronisations for all of them.
    """
    way = suppress_each if predictions.device.type == "cpu" else suppress_together
    suppress = partial(way, iou=iou, limit=max_detections, agnostic=agnostic)
    found: list[Tensor] = []
    for part in predictions.float().split(IMAGES_TOGETHER):
        line = _Line(part, _scores(part, conf, classes, multi_label))
        found += line.suppressed(suppress, max_detections)
    return found


def _scores(predictions: Tensor, conf: float, classes: Sequence[int] | None, multi_label: bool) -> Tensor:
    """Return [B,anchors,nc] confidences, 0 where there is no candidate."""
    objectness = predictions[..., 4:5]
    scores = predictions[..., 5:] * objectness
    scores.masked_fill_(~((scores > conf) & (objectness > conf)), 0)
    if not multi_label and scores.shape[2] > 1:
        best, label = scores.max(2, keepdim=True)
        scores = torch.zeros_like(scores).scatter_(2, label, best)
    if classes is not None:
        other = [label for label in range(scores.shape[2]) if label not in classes]
        scores[..., other] = 0
    return scores


@dataclass(frozen=True, slots=True)
class _Line:
    """The candidates of some images, who line up by their confidence."""

    predictions: Tensor
    """[B,anchors,5+nc]."""
    scores: Tensor
    """[B,anchors,nc], 0 where there is no candidate."""

    def suppressed(self, suppress: Callable[[Tensor], list[Tensor]], limit: int) -> list[Tensor]:
        """Return what `suppress` leaves of each line, up to `limit`.

        What is kept among the first k depends on these k alone, so a growing head of a line is suppressed until it
        holds `limit` boxes: at low confidence that leaves most candidates untouched.
        """
        lengths = self.scores.count_nonzero((1, 2)).tolist()
        found: dict[int, Tensor] = {}
        waiting, size = list(range(len(lengths))), FIRST_HEAD
        while waiting:
            size = min(size, MAX_CANDIDATES)
            together = max(IMAGES_TOGETHER * FIRST_HEAD // size, 1)
            for first in range(0, len(waiting), together):
                images = waiting[first : first + together]
                found.update(zip(images, suppress(self._of(images).head(size)), strict=True))
            more = size < MAX_CANDIDATES
            waiting = [i for i in waiting if more and len(found[i]) < limit and lengths[i] > size]
            size *= GROWTH
        return [found[image] for image in range(len(lengths))]

    def _of(self, images: list[int]) -> _Line:
        whole = len(images) == len(self.scores)
        return self if whole else _Line(self.predictions[images], self.scores[images])

    def head(self, size: int) -> Tensor:
        """Return the first [B,n,6] xyxy, confidence, class, n at most `size`; confidence 0 where a line is shorter."""
        anchors, labels = self.scores.shape[1:]
        scores, rows = self.scores, torch.arange(anchors, device=self.scores.device)
        if size < anchors:
            # A candidate among the first k is on one of the k anchors whose best candidates come first.
            scores, rows = _highest(scores.amax(2), rows, size)
            scores = self.scores.gather(1, rows[..., None].expand(-1, -1, labels))
        places = rows[..., None] * labels + torch.arange(labels, device=rows.device)
        confidence, place = _highest(scores.flatten(1), places.flatten(-2), size)
        row, label = place // labels, place % labels
        boxes_xywh = self.predictions[..., :4].gather(1, row[..., None].expand(-1, -1, 4))
        return torch.cat((xywh_to_xyxy(boxes_xywh), confidence[..., None], label[..., None].float()), dim=2)


def _highest(scores: Tensor, ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the `size` highest of [B,n] scores, 0 and above, in falling order, and their ids; of equals the lowest.

    `ids` [n] or [B,n], below 2^32, become the lower half of the keys that are sorted, so no two keys are equal.
    """
    keys = (-scores.contiguous().view(torch.int32).long() << 32) | ids
    size = min(size, keys.shape[1])
    if keys.device.type == "cpu":
        # NumPy's sorting is vectorised, and five to ten times faster than torch's.
        array = keys.numpy()
        if size < keys.shape[1]:
            array = np.partition(array, size - 1, axis=1)[:, :size]
        keys = torch.from_numpy(np.sort(array, axis=1))
    else:
        keys = keys.topk(size, largest=False, sorted=True).values
    return (-(keys >> 32)).int().view(torch.float32), keys & 0xFFFFFFFF
