"""Detection heads: what every head offers, and the anchor-based one: a 1x1 convolution a level."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from starling.core.errors import UsageError
from starling.model.loss import DetectionLoss, Loss, LossGains

PRIOR_OBJECTS = 8
"""Expected number of objects in a 640 px image before training; determines the initial objectness bias."""
PRIOR_CLASS = 0.6
"""Expected total probability of the classes of an object before training."""


class Head(nn.Module, ABC):
    """The last layer of a detector: raw predictions from maps, their decoding and their loss."""

    losses: ClassVar[tuple[str, str, str]]
    """Names of the parts of the loss, in the order of its answers and of the columns of results.csv."""
    answer: ClassVar[str]
    """The numbers of one prediction of `exported`, in words."""
    answer_axis: ClassVar[int]
    """The axis of `exported` along which these numbers lie; 1 or 2."""
    nc: int
    """Number of classes."""
    stride: Tensor
    """[levels] pixels between two cells of each level."""
    anchors_px: Tensor | None
    """[levels, anchors, 2] width and height of the anchors in pixels; None if the head has no anchors."""

    @abstractmethod
    def forward(self, maps: Sequence[Tensor]) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return raw predictions, one tensor a level; in eval mode (decoded, raw)."""

    @abstractmethod
    def decode(self, raw: Sequence[Tensor]) -> Tensor:
        """Turn raw predictions into [B, all predictions, 5+nc] float32: xywh in pixels, objectness, class scores."""

    @abstractmethod
    def exported(self, decoded: Tensor) -> Tensor:
        """Return decoded predictions as exported files answer them."""

    @abstractmethod
    def describe_layout(self) -> dict[str, Any]:
        """Return the keys of a layout that describe this head."""

    @abstractmethod
    def build_loss(self, hyp: Any, image_size: int) -> Loss:
        """Return the loss with the gains of `hyp`, on the head's device; `image_size` in pixels.

        Raises UsageError if the hyperparameters are those of another head.
        """


class Detect(Head):
    """Predict box, objectness and classes for every anchor of every cell of every level."""

    losses = ("box", "obj", "cls")
    answer = "x, y, width, height in pixels, objectness, class scores"
    answer_axis = 2
    anchors: Tensor
    """[levels, anchors, 2] width and height in stride units; part of the state dict."""

    def __init__(
        self, nc: int, anchors_px: Tensor, strides: Sequence[float], channels: Sequence[int]
    ) -> None:
        """Build for `nc` classes; `anchors_px` is [levels, anchors, 2] pixels, one level for each stride."""
        super().__init__()
        self.nc = nc
        self.outputs = nc + 5
        """Number of outputs per anchor: x, y, w, h, objectness, classes."""
        # The device is named, so that a detector built on torch's meta device, for counting, still knows its strides.
        stride = torch.tensor(strides, dtype=torch.float32, device="cpu")
        self.register_buffer("stride", stride, persistent=False)
        self.register_buffer("anchors", torch.zeros_like(anchors_px, dtype=torch.float32))
        self.stride: Tensor
        self.m = nn.ModuleList(nn.Conv2d(c, self.outputs * anchors_px.shape[1], 1) for c in channels)
        self.set_anchors(anchors_px)
        self._start_biases()

    @property
    def anchors_px(self) -> Tensor:  # type: ignore[override]
        """[levels, anchors, 2] width and height of the anchors in pixels."""
        return self.anchors * self.stride.view(-1, 1, 1)

    def set_anchors(self, anchors_px: Tensor) -> None:
        """Replace the anchors by [levels, anchors, 2] pixels, reversed if smaller ones would go to larger strides."""
        areas = anchors_px.prod(-1).mean(-1)
        if (areas[-1] - areas[0]) * (self.stride[-1] - self.stride[0]) < 0:
            anchors_px = anchors_px.flip(0)
        self.anchors.copy_(anchors_px.to(self.stride) / self.stride.view(-1, 1, 1))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return raw predictions; in eval mode (decoded, raw).

        `maps` has one [B,c,h,w] per level. Raw: one [B, anchors, h, w, 5+nc] per level. Decoded: see `decode`.
        """
        raw = []
        for convolution, x in zip(self.m, maps, strict=True):
            batch, _, height, width = x.shape
            y = convolution(x).view(batch, -1, self.outputs, height, width)
            raw.append(y.permute(0, 1, 3, 4, 2).contiguous())
        return raw if self.training else (self.decode(raw), raw)

    def decode(self, raw: Sequence[Tensor]) -> Tensor:
        """Turn raw predictions into [B, all anchors, 5+nc] float32: xywh in pixels, objectness, class scores.

        xy = (2 sigmoid - 0.5 + cell) stride, wh = (2 sigmoid)^2 anchor, one level after the other.
        """
        decoded = []
        for level, prediction in enumerate(raw):
            # Half precision has too few digits for coordinates in pixels.
            p = prediction.float().sigmoid()
            batch, count, height, width, outputs = p.shape
            stride = self.stride[level]
            y, x = torch.meshgrid(
                torch.arange(height, device=p.device, dtype=p.dtype),
                torch.arange(width, device=p.device, dtype=p.dtype),
                indexing="ij",
            )
            cells = torch.stack((x, y), dim=-1)
            anchors = self.anchors[level].float().view(1, count, 1, 1, 2) * stride
            xy = (p[..., :2] * 2 - 0.5 + cells) * stride
            wh = (p[..., 2:4] * 2) ** 2 * anchors
            decoded.append(torch.cat((xy, wh, p[..., 4:]), dim=-1).view(batch, -1, outputs))
        return torch.cat(decoded, dim=1)

    def exported(self, decoded: Tensor) -> Tensor:
        """Return [B, all anchors, 5+nc] as it is."""
        return decoded

    def describe_layout(self) -> dict[str, Any]:
        """Return the number of classes, and the anchors as rows of pixels."""
        return {"nc": self.nc, "anchors": self.anchors_px.flatten(1).tolist()}

    def build_loss(self, hyp: Any, image_size: int) -> DetectionLoss:
        """Return box, objectness and class loss; raises UsageError for hyperparameters of an anchor-free head."""
        if hyp.dfl is not None:
            raise UsageError(
                "the hyperparameters have `dfl` and so are those of an anchor-free layout, but this layout has anchors; "
                "give --hyp hyp.scratch-low.yaml, or a file without dfl"
            )
        gains = LossGains.scaled(hyp, nc=self.nc, levels=len(self.stride), image_size=image_size)
        return DetectionLoss(self.stride, self.anchors, self.nc, gains).to(self.anchors.device)

    @torch.no_grad()
    def _start_biases(self) -> None:
        """Initialise the biases for rare objects and equally likely classes (RetinaNet, section 3.3)."""
        for convolution, stride in zip(self.m, self.stride.tolist(), strict=True):
            assert isinstance(convolution, nn.Conv2d)
            assert convolution.bias is not None
            bias = convolution.bias.view(-1, self.outputs)
            bias[:, 4] = math.log(PRIOR_OBJECTS / (640 / stride) ** 2)
            bias[:, 5:] = math.log(PRIOR_CLASS / (self.nc - 0.99999))
