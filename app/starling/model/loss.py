"""The loss of a YOLOv5-family detector: CIoU of boxes, objectness, classes.

All tensor shapes depend on the shapes of the inputs, never on values: candidates without a match have weight 0. So
a step needs no synchronisation with the device and can be captured in a graph. Gains are tensors that `set_gains` fills
in place, so that a new candidate of a search needs no new graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starling.boxes.geometry import iou_aligned_xywh
from starling.core.errors import ConfigError

FOCAL_ALPHA = 0.25
LEVEL_BALANCE_P5 = (4.0, 1.0, 0.4)
LEVEL_BALANCE = (4.0, 1.0, 0.25, 0.06, 0.02)
"""Weight of each level's objectness, from small strides to large: for three levels, and for other numbers of levels."""
NOMINAL_SIZE = 640
NOMINAL_CLASSES = 80
NOMINAL_LEVELS = 3

# The cell itself, then the left, upper, right and lower neighbour.
_NEIGHBOURS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))
_REACH = 0.5
"""Distance in cells within which a label's centre also counts for a neighbouring cell."""


def check_gains(gains: Any) -> None:
    """Raise ConfigError if a field of the dataclass `gains` is not a finite number of 0 or above."""
    for field in fields(gains):
        value = getattr(gains, field.name)
        if not 0 <= value < float("inf"):
            raise ConfigError(field.name, value, "must be a finite number, 0 or above")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossGains:
    """The hyperparameters of the loss, after scaling."""

    box: float = 0.05
    obj: float = 1.0
    cls: float = 0.5
    cls_pw: float = 1.0
    """Weight of positive samples in the class loss."""
    obj_pw: float = 1.0
    """Weight of positive samples in the objectness loss."""
    anchor_t: float = 4.0
    """An anchor takes a label if the ratio of their sides, in both directions, is below this number."""
    fl_gamma: float = 0.0
    """Focal loss gamma (Lin et al. 2017); 0 is plain BCE."""
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Check that the values are in the ranges of the formulas."""
        check_gains(self)
        if self.label_smoothing >= 1:
            raise ConfigError("label_smoothing", self.label_smoothing, "must be below 1")

    @classmethod
    def scaled(cls, hyp: Any, *, nc: int, levels: int, image_size: int) -> Self:
        """Return the gains of `hyp` (attributes with the field names), scaled by levels, classes and image size."""
        per_level = NOMINAL_LEVELS / levels
        values = {field.name: float(getattr(hyp, field.name)) for field in fields(cls)}
        values["box"] *= per_level
        values["cls"] *= nc / NOMINAL_CLASSES * per_level
        values["obj"] *= (image_size / NOMINAL_SIZE) ** 2 * per_level
        return cls(**values)


class Matches(NamedTuple):
    """Labels assigned to the anchors of one level: K = 5 cells x anchors x targets candidates, most without a match."""

    matched: Tensor
    """[K] bool."""
    cell: Tensor
    """[K] index into the flattened [B, anchors, h, w] of the level."""
    box_xywh: Tensor
    """[K,4] target in stride units, with the centre relative to its cell; a unit box for candidates without a match."""
    anchor: Tensor
    """[K,2] in stride units."""
    label: Tensor
    """[K] class."""


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a batch in one of several processes; the losses of all processes add up to the batch's loss."""

    images: int
    """Number of images of the whole batch."""
    part: float
    """Fraction of the images in this process, 0 to 1."""
    pool: Callable[[Tensor], Tensor]
    """Sums a tensor over all processes."""


class Loss(nn.Module, ABC):
    """What training and validation ask of a head's loss."""

    @abstractmethod
    def forward(
        self, predictions: Sequence[Tensor], targets: Tensor, share: Share | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (scalar loss times batch size, [3] the loss's parts after gains, detached).

        `predictions` are the head's raw ones, one a level; `targets` [n,6] image in batch, class, xywhn, with an image
        index below 0 for padding. With a `share`, both results are this process's addends.
        """


class DetectionLoss(Loss):
    """Box, objectness and class loss of raw predictions against targets.

    `strides` and `anchors_in_strides` [levels, anchors, 2] are those of the head; `gains` are scaled already. Move
    the module to the device of the predictions (`.to(device)`).
    """

    def __init__(
        self, strides: Sequence[float] | Tensor, anchors_in_strides: Tensor, nc: int, gains: LossGains
    ) -> None:
        super().__init__()
        if len(strides) != len(anchors_in_strides):
            raise ConfigError("anchors", tuple(anchors_in_strides.shape), f"needs {len(strides)} levels")
        self.nc = nc
        levels = len(strides)
        self.balance = LEVEL_BALANCE_P5 if levels == len(LEVEL_BALANCE_P5) else LEVEL_BALANCE[:levels]
        anchors = anchors_in_strides.detach().clone().float()
        self.register_buffer("anchors", anchors, persistent=False)
        self.register_buffer("neighbours", torch.tensor(_NEIGHBOURS), persistent=False)
        self.register_buffer("_values", torch.zeros(len(fields(LossGains))), persistent=False)
        self.anchors: Tensor
        self.neighbours: Tensor
        self._values: Tensor
        self.focal = False
        self.set_gains(gains)

    def set_gains(self, gains: LossGains) -> None:
        """Replace the gains in place; captured graphs use the new gains, unless focal loss is turned on or off."""
        self._values.copy_(torch.tensor(astuple(gains)))
        self.focal = gains.fl_gamma > 0

    def set_anchors(self, anchors_in_strides: Tensor) -> None:
        """Replace the anchors in place, after AutoAnchor."""
        self.anchors.copy_(anchors_in_strides)

    def forward(
        self, predictions: Sequence[Tensor], targets: Tensor, share: Share | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (scalar loss times batch size, [3] box, objectness and class loss after gains, detached).

        `predictions` has one raw [B, anchors, h, w, 5+nc] per level; `targets` [n,6] are image in batch, class, xywhn.
        A row with an image index below 0 is padding. Computes in float32 even under autocast. With `share` both results
        are this process's summands: means are taken over the matches and cells of the whole batch.
        """
        with torch.autocast(predictions[0].device.type, enabled=False):
            gains = dict(zip((f.name for f in fields(LossGains)), self._values.unbind(), strict=True))
            targets = targets.to(self.anchors)
            box = obj = cls = self.anchors.new_zeros(())
            matches = [
                self.match(level, prediction.shape, targets, gains["anchor_t"])
                for level, prediction in enumerate(predictions)
            ]
            found = torch.stack([level.matched.float().sum() for level in matches])
            if share is not None:
                found = share.pool(found)
            for level, prediction in enumerate(predictions):
                level_box, level_obj, level_cls = self._level(
                    prediction, matches[level], found[level].clamp(min=1), gains
                )
                box = box + level_box
                obj = obj + level_obj * self.balance[level]
                cls = cls + level_cls
            images = predictions[0].shape[0]
            if share is not None:
                images, obj = share.images, obj * share.part
            parts = torch.stack((box * gains["box"], obj * gains["obj"], cls * gains["cls"]))
            return parts.sum() * images, parts.detach()

    def match(self, level: int, shape: Sequence[int], targets: Tensor, anchor_t: Tensor) -> Matches:
        """Assign targets to the anchors and cells of one level with raw predictions of `shape` [B,a,h,w,...].

        An anchor takes a target if max(ratio, 1/ratio) of both sides is below `anchor_t`, in the target's cell and in
        the neighbours within half a cell of its centre. The order of candidates is neighbour, anchor, target.
        """
        batch, count, height, width = shape[:4]
        anchors = self.anchors[level]
        image, label = targets[:, 0].long(), targets[:, 1].long()
        # Sizes enter as Python numbers: a tensor made of them would need a copy to the device and a wait.
        x, y = targets[:, 2] * width, targets[:, 3] * height
        xy = torch.stack((x, y), dim=-1)
        wh = torch.stack((targets[:, 4] * width, targets[:, 5] * height), dim=-1)

        ratio = wh[None] / anchors[:, None]  # [a,n,2]
        fits = torch.maximum(ratio, 1 / ratio).amax(-1) < anchor_t
        fits = fits & (image >= 0) & (image < batch)
        reach = self._reach(xy, torch.stack((width - x, height - y), dim=-1))  # [5,n]
        matched = reach[:, None] & fits[None]  # [5,a,n]

        corner = (xy[None] - self.neighbours[:, None] * _REACH).long()  # [5,n,2]
        column, row = corner[..., 0].clamp(0, width - 1), corner[..., 1].clamp(0, height - 1)
        corner = torch.stack((column, row), dim=-1)
        box = torch.cat((xy - corner, wh.expand(len(corner), -1, -1)), dim=-1)  # [5,n,4]
        box = torch.where(matched[..., None], box[:, None], box.new_ones(()))

        first = (image.clamp(0, batch - 1) * count)[None] + torch.arange(count, device=xy.device)[:, None]
        cell = (first[None] * height + row[:, None]) * width + column[:, None]
        return Matches(
            matched=matched.flatten(),
            cell=cell.flatten(),
            box_xywh=box.reshape(-1, 4),
            anchor=anchors[None, :, None].expand(*matched.shape, 2).reshape(-1, 2),
            label=label.expand(matched.shape).reshape(-1).clamp(0, self.nc - 1),
        )

    def _reach(self, xy: Tensor, from_far: Tensor) -> Tensor:
        """Return [5,n] bool: the cells that take the target, never a neighbour outside the map.

        `xy` and `from_far` [n,2] are the distances in cells of the centres from the map's near and far edges.
        """
        near = (xy % 1 < _REACH) & (xy > 1)
        far = (from_far % 1 < _REACH) & (from_far > 1)
        own = torch.ones_like(near[:, 0])
        return torch.stack((own, near[:, 0], near[:, 1], far[:, 0], far[:, 1]))

    def _level(
        self, prediction: Tensor, matches: Matches, found: Tensor, gains: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight = matches.matched.float()
        # Only rows that may match are converted to float32; the map keeps the type of autocast.
        rows = prediction.reshape(-1, prediction.shape[-1]).index_select(0, matches.cell).float()

        sigmoid = rows[:, :4].sigmoid()
        predicted = torch.cat((sigmoid[:, :2] * 2 - 0.5, (sigmoid[:, 2:] * 2) ** 2 * matches.anchor), dim=1)
        iou = iou_aligned_xywh(predicted, matches.box_xywh, kind="ciou")
        box = ((1 - iou) * weight).sum() / found

        obj_target = self._objectness_target(iou.detach().clamp(min=0), matches, prediction[..., 0].numel())
        obj = self._bce(
            prediction[..., 4].float().flatten(), obj_target, gains["obj_pw"], gains["fl_gamma"]
        ).mean()

        if self.nc == 1:
            return box, obj, box.new_zeros(())
        smooth = gains["label_smoothing"] / 2
        hot = F.one_hot(matches.label, self.nc).float()
        cls_target = hot * (1 - smooth) + (1 - hot) * smooth
        cls = self._bce(rows[:, 5:], cls_target, gains["cls_pw"], gains["fl_gamma"])
        return box, obj, (cls * weight[:, None]).sum() / (found * self.nc)

    @staticmethod
    def _objectness_target(iou: Tensor, matches: Matches, cells: int) -> Tensor:
        """Return [cells] IoU of each cell's match, 0 without a match; of several matches the last one counts.

        Scattering the index of the match, not the IoU, makes "last" equal on every device and in every run.
        """
        place = torch.arange(1, len(iou) + 1, device=iou.device) * matches.matched
        last = torch.zeros(cells, dtype=place.dtype, device=iou.device)
        last.scatter_reduce_(0, matches.cell, place, "amax")
        return torch.cat((iou.new_zeros(1), iou)).index_select(0, last)

    def _bce(self, logits: Tensor, target: Tensor, positive_weight: Tensor, gamma: Tensor) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(
            logits, target, pos_weight=positive_weight, reduction="none"
        )
        if not self.focal:
            return loss
        score = logits.sigmoid()
        hit = target * score + (1 - target) * (1 - score)
        alpha = target * FOCAL_ALPHA + (1 - target) * (1 - FOCAL_ALPHA)
        # Below gamma 1 the slope at a perfect score is infinite; the clamp avoids that.
        return loss * alpha * (1 - hit).clamp(min=1e-7) ** gamma
