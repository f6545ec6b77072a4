"""Detect objects in single images; the boxes are in the image's own pixels."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from starling.boxes.nms import non_max_suppression
from starling.data.augment.letterbox import Size, apply_letterbox, boxes_to_original, letterbox_geometry
from starling.device import Compute
from starling.prediction.inference import Predictor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """The thresholds of detection; see `non_max_suppression`."""

    confidence: float = 0.25
    iou: float = 0.45
    max_detections: int = 1000
    classes: Sequence[int] | None = None
    agnostic: bool = False


@dataclass(slots=True)
class Seconds:
    """The seconds spent in each stage, over all images."""

    prepare: float = 0.0
    network: float = 0.0
    suppression: float = 0.0

    def describe(self, images: int) -> str:
        """Return the mean milliseconds per image of each stage."""
        prepare, network, suppression = (
            1e3 * seconds / max(images, 1) for seconds in (self.prepare, self.network, self.suppression)
        )
        return (
            f"{prepare:.1f} ms preparing, {network:.1f} ms network, {suppression:.1f} ms suppression an image"
        )


class ImageDetector:
    """Runs a model on images of any size, one at a time."""

    def __init__(
        self, model: Predictor, compute: Compute, size_hw: tuple[int, int], thresholds: Thresholds
    ) -> None:
        """Take a model on its device; images are letterboxed into `size_hw` pixels."""
        self._model = model
        self._stride = model.image_multiple
        self._compute = compute
        self._size_hw = size_hw
        self._thresholds = thresholds
        self.seconds = Seconds()

    @torch.inference_mode()
    def __call__(self, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return [n,6] xyxy, confidence, class for an RGB image, uint8 [H,W,3]; the most confident first."""
        began = time.perf_counter()
        original_hw = (image.shape[0], image.shape[1])
        geometry = letterbox_geometry(original_hw, self._size_hw, stride=self._stride)
        boxed = torch.from_numpy(apply_letterbox(image, geometry)).permute(2, 0, 1)[None]
        batch = to_input(boxed, self._compute)
        prepared = time.perf_counter()
        with self._compute.autocast():
            decoded = self._model(batch)[0].float()
        if not self._compute.on_cpu:
            torch.cuda.synchronize(
                self._compute.device
            )  # otherwise the network's time would count as suppression
        predicted = time.perf_counter()
        kept = self._thresholds
        found = non_max_suppression(
            decoded,
            kept.confidence,
            kept.iou,
            classes=kept.classes,
            agnostic=kept.agnostic,
            max_detections=kept.max_detections,
        )[0].cpu()
        detections = boxes_to_original(found, geometry, original_hw).numpy()
        self.seconds.prepare += prepared - began
        self.seconds.network += predicted - prepared
        self.seconds.suppression += time.perf_counter() - predicted
        return detections


def fit_stride(size: int, stride: int) -> int:
    """Return `size` rounded up to a multiple of `stride`, at least two of them."""
    fitted = max(-(-size // stride), 2) * stride
    if fitted != size:
        logger.info(f"--imgsz {size} is rounded up to {fitted}, a multiple of the layout's stride {stride}")
    return fitted


def fit_size(size_hw: tuple[int, int], stride: int) -> tuple[int, int]:
    """Return height and width rounded up to multiples of `stride`, at least two of them, and say what changes."""
    height = fit_stride(size_hw[0], stride)
    return height, height if size_hw[1] == size_hw[0] else fit_stride(size_hw[1], stride)


def to_input(images: Tensor, compute: Compute, scaled_hw: Size | None = None) -> Tensor:
    """Return images [B,3,H,W] as 0..1 on the device, channels last, resized to `scaled_hw` if given.

    uint8 is converted to float32 and divided by 255; floating-point images are already 0..1 and stay unchanged.
    """
    pixels = images.to(compute.device, non_blocking=True)
    if images.dtype == torch.uint8:
        pixels = pixels.to(torch.float32, memory_format=torch.channels_last).div_(255)
    if scaled_hw is None:
        return pixels
    return functional.interpolate(pixels, scaled_hw, mode="bilinear", align_corners=False)
