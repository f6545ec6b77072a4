"""Suppression with a few large operations over all images, for GPUs; synchronises a few times per block.

Candidates are processed in blocks. Candidates that overlap an earlier kept box are already removed, so most of a block
is kept; the kept boxes of the block are then compared with all later candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from starling.boxes.geometry import xywh_to_xyxy
from starling.boxes.nms.rules import MAX_CANDIDATES, Rules, below

FIRST_HEAD = 2048
"""The number of an image's candidates that are sorted first."""
GROWTH = 4
"""The factor by which that number grows if the candidates are not enough."""
IMAGES_TOGETHER = 32
"""The number of images processed at once, limited by memory; fewer for a larger head."""
BLOCK = 512

_AREA, _GROUP, _PLACE = 4, 5, 6
"""Rows of a table of candidates, after the four corners."""


def suppress(predictions: Tensor, rules: Rules) -> list[Tensor]:
    """Return the kept boxes of each image, [n,6] xyxy, confidence, class; `predictions` [B,anchors,5+nc] is float32."""
    found: list[Tensor] = []
    for part in predictions.split(IMAGES_TOGETHER):
        found += _Line(part, _scores(part, rules)).suppressed(rules)
    return found


def _scores(predictions: Tensor, rules: Rules) -> Tensor:
    """Return [B,anchors,nc] confidences; 0 means no candidate."""
    objectness = predictions[..., 4:5]
    scores = predictions[..., 5:] * objectness
    scores.masked_fill_(~((scores > rules.conf) & (objectness > rules.conf)), 0)
    if not rules.multi_label and scores.shape[2] > 1:
        best, label = scores.max(2, keepdim=True)
        scores = torch.zeros_like(scores).scatter_(2, label, best)
    if rules.classes is not None:
        other = [label for label in range(scores.shape[2]) if label not in rules.classes]
        scores[..., other] = 0
    return scores


@dataclass(frozen=True, slots=True)
class _Line:
    """The candidates of some images, to be taken in falling order of confidence."""

    predictions: Tensor
    """[B,anchors,5+nc]."""
    scores: Tensor
    """[B,anchors,nc]; 0 means no candidate."""

    def suppressed(self, rules: Rules) -> list[Tensor]:
        """Return the kept boxes of each image.

        The kept boxes among the first k candidates depend on these k only. A growing head of the candidates is
        therefore suppressed until enough boxes are kept; at low confidence, most candidates are never examined.
        """
        lengths = self.scores.count_nonzero((1, 2)).tolist()
        found: dict[int, Tensor] = {}
        waiting, size = list(range(len(lengths))), FIRST_HEAD
        while waiting:
            size = min(size, MAX_CANDIDATES)
            together = max(IMAGES_TOGETHER * FIRST_HEAD // size, 1)
            for first in range(0, len(waiting), together):
                images = waiting[first : first + together]
                found.update(zip(images, _keep(self._of(images).head(size), rules), strict=True))
            more = size < MAX_CANDIDATES
            waiting = [i for i in waiting if more and len(found[i]) < rules.limit and lengths[i] > size]
            size *= GROWTH
        return [found[image] for image in range(len(lengths))]

    def _of(self, images: list[int]) -> _Line:
        whole = len(images) == len(self.scores)
        return self if whole else _Line(self.predictions[images], self.scores[images])

    def head(self, size: int) -> Tensor:
        """Return the first [B,n,6] xyxy, confidence, class; n is at most `size`, and confidence 0 is padding."""
        anchors, labels = self.scores.shape[1:]
        scores, rows = self.scores, torch.arange(anchors, device=self.scores.device)
        if size < anchors:
            # The first k candidates are on the k anchors whose best candidates are highest.
            scores, rows = _highest(scores.amax(2), rows, size)
            scores = self.scores.gather(1, rows[..., None].expand(-1, -1, labels))
        places = rows[..., None] * labels + torch.arange(labels, device=rows.device)
        confidence, place = _highest(scores.flatten(1), places.flatten(-2), size)
        row, label = place // labels, place % labels
        boxes_xywh = self.predictions[..., :4].gather(1, row[..., None].expand(-1, -1, 4))
        return torch.cat((xywh_to_xyxy(boxes_xywh), confidence[..., None], label[..., None].float()), dim=2)


def _highest(scores: Tensor, ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the `size` highest of [B,n] scores >= 0 in falling order, and their ids; equal scores by lowest id.

    `ids` [n] or [B,n], below 2^32, are the lower halves of the sort keys, so no two keys are equal.
    """
    keys = (-scores.contiguous().view(torch.int32).long() << 32) | ids
    size = min(size, keys.shape[1])
    keys = keys.topk(size, largest=False, sorted=True).values
    return (-(keys >> 32)).int().view(torch.float32), keys & 0xFFFFFFFF


def _keep(candidates: Tensor, rules: Rules) -> list[Tensor]:
    """Return the kept boxes of each image, [n,6].

    `candidates` [B,n,6] is xyxy, confidence, class in falling order of confidence; confidence 0 is padding.
    """
    over, limit = below(rules.iou), rules.limit
    low_x, low_y, high_x, high_y, confidence, label = candidates.unbind(2)
    area = (high_x - low_x) * (high_y - low_y)
    group = torch.zeros_like(label) if rules.agnostic else label
    place = torch.arange(candidates.shape[1], device=candidates.device).expand_as(label)
    # A column without a candidate gets the group NaN, which equals no other group.
    group = group.where(confidence > 0, math.nan)
    rest = _picked(torch.stack((low_x, low_y, high_x, high_y, area, group, place), dim=1), confidence > 0)
    found = candidates.new_zeros(len(candidates), limit + 1, 6)  # the last row collects removed boxes
    image = torch.arange(len(candidates), device=candidates.device)[:, None]
    count = torch.zeros_like(image)
    while rest.shape[2]:
        block, rest = rest[..., :BLOCK], rest[..., BLOCK:]
        stays = _stays(block, over)
        position = count + stays.cumsum(1) - 1
        stays &= position < limit
        rows = candidates.gather(1, block[:, _PLACE, :, None].long().expand(-1, -1, 6))
        found[image, position.where(stays, limit)] = rows
        count += stays.sum(1, keepdim=True)
        free = ~_beats(_picked(block, stays), rest, over).any(1)
        rest = _picked(rest, free & (count < limit))
    return [rows[:number] for rows, number in zip(found, count[:, 0].tolist(), strict=True)]


def _picked(table: Tensor, wanted: Tensor) -> Tensor:
    """Return the `wanted` [B,n] columns of [B,7,n], compacted; columns without a candidate are always dropped."""
    if not wanted.numel():
        return table
    wanted = wanted & ~table[:, _GROUP].isnan()
    count = wanted.sum(1, keepdim=True)
    width = int(count.max())
    place = (wanted.cumsum(1) - 1).where(wanted, width)
    column = torch.arange(wanted.shape[1], device=table.device)
    order = column.new_zeros(len(table), width + 1).scatter_(1, place, column.expand_as(place))[:, :width]
    picked = table.gather(2, order[:, None].expand(-1, table.shape[1], -1))
    picked[:, _GROUP].masked_fill_(column[:width] >= count, math.nan)
    return picked


def _beats(a: Tensor, b: Tensor, over: float) -> Tensor:
    """Return [B,k,n]: whether columns of [B,7,k] and [B,7,n] have the same group and overlap by more than `over`."""
    one, two = a.unsqueeze(3).unbind(1), b.unsqueeze(2).unbind(1)
    inter = torch.minimum(one[2], two[2]).sub_(torch.maximum(one[0], two[0])).clamp_(min=0)
    height = torch.minimum(one[3], two[3]).sub_(torch.maximum(one[1], two[1]))
    inter.mul_(height)  # negative for a negative height: never above `over`
    union = torch.add(one[_AREA], two[_AREA], out=height).sub_(inter)
    return (inter.div_(union) > over).logical_and_(one[_GROUP] == two[_GROUP])


def _stays(block: Tensor, over: float) -> Tensor:
    """Return [B,n]: whether each column stays, if a staying column removes the later columns that it overlaps.

    Each iteration recomputes all columns from the previous result, and settles at least one more. A few iterations
    are enough, because chains of overlapping boxes are short.
    """
    beats = _beats(block, block, over).triu_(1).float()
    there = ~block[:, _GROUP].isnan()
    stays = there
    while True:
        before, stays = stays, there & (torch.bmm(stays[:, None].float(), beats)[:, 0] == 0)
        if torch.equal(before, stays):
            return stays
