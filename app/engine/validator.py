"""Validate a detector: detections, metrics, losses, and a few batches to draw."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from app.boxes import non_max_suppression, xywhn_to_xyxy
from app.data.letterbox import Size, boxes_to_original
from app.data.loader import Batch
from app.engine.device import Compute
from app.loss import DetectionLoss
from app.metrics import ConfusionMatrix, Metrics, average_precision, match_detections
from app.model.detector import Detector

CONFIDENCE = 0.001
IOU = 0.6
MAX_DETECTIONS = 300


@dataclass(frozen=True, slots=True)
class Preview:
    """One batch to draw, in its letterboxed frame: images and both kinds of boxes."""

    indices: tuple[int, ...]
    images: np.ndarray
    """[B,3,H,W] uint8."""
    targets: np.ndarray
    """[n,6] image, class, xywhn."""
    detections: list[np.ndarray]
    """[m,6] xyxy pixels, confidence, class; one array an image."""


@dataclass(frozen=True, slots=True)
class Validation:
    """What one pass over a split says."""

    metrics: Metrics
    losses: tuple[float, float, float]
    confusion: ConfusionMatrix
    images: int
    seconds: float
    previews: list[Preview] = field(default_factory=list)


@torch.no_grad()
def validate(
    model: Detector,
    batches: Iterable[Batch],
    loss: DetectionLoss | None,
    compute: Compute,
    *,
    previews: int = 0,
    after_batch: Callable[[int], None] = lambda images: None,
) -> Validation:
    """Return metrics of `model` (in eval mode) over `batches`, matched in each picture's own pixels.

    `loss` None leaves the losses NaN. `after_batch` is told the number of images done so far.
    """
    started = time.monotonic()
    correct: list[Tensor] = []
    scored: list[Tensor] = []
    actual: list[Tensor] = []
    confusion = ConfusionMatrix(model.nc)
    loss_sum = torch.zeros(3, device=compute.device)
    drawn: list[Preview] = []
    done = iterations = 0
    for batch in batches:
        images = to_input(batch.images, compute)
        with compute.autocast():
            decoded, raw = model(images)
        if loss is not None:
            loss_sum += loss(raw, batch.targets.to(compute.device))[1]
        detections = non_max_suppression(
            decoded, CONFIDENCE, IOU, multi_label=model.nc > 1, max_detections=MAX_DETECTIONS
        )
        for index, found in enumerate(detections):
            labels, found_original = _in_original_pixels(batch, index, found.cpu())
            confusion.add(found_original, labels)
            correct.append(match_detections(found_original, labels))
            scored.append(found_original[:, 4:])
            actual.append(labels[:, 0])
        if len(drawn) < previews:
            drawn.append(_preview(batch, detections))
        done += len(batch.indices)
        iterations += 1
        after_batch(done)
    confidence, predicted = torch.cat(scored).numpy().T
    metrics = average_precision(torch.cat(correct).numpy(), confidence, predicted, torch.cat(actual).numpy())
    mean = (loss_sum / iterations).tolist() if loss is not None else [float("nan")] * 3
    return Validation(
        metrics, (mean[0], mean[1], mean[2]), confusion, done, time.monotonic() - started, drawn
    )


def to_input(images: Tensor, compute: Compute, scaled_hw: Size | None = None) -> Tensor:
    """Return uint8 [B,3,H,W] as float32 0..1 on the device, channels last, resized to `scaled_hw` if given."""
    pixels = (
        images.to(compute.device, non_blocking=True)
        .to(torch.float32, memory_format=torch.channels_last)
        .div_(255)
    )
    if scaled_hw is None:
        return pixels
    return functional.interpolate(pixels, scaled_hw, mode="bilinear", align_corners=False)


def _in_original_pixels(batch: Batch, index: int, detections: Tensor) -> tuple[Tensor, Tensor]:
    """Return labels [n,5] class, xyxy and detections [m,6] in the pixels of the picture as it is on disk."""
    assert batch.geometry is not None, "validation batches carry their letterbox"
    geometry, original_hw = batch.geometry[index], batch.original_hw[index]
    height, width = batch.images.shape[2:]
    targets = batch.targets[batch.targets[:, 0] == index]
    boxes_xyxy = boxes_to_original(xywhn_to_xyxy(targets[:, 2:], (height, width)), geometry, original_hw)
    labels = torch.cat((targets[:, 1:2], boxes_xyxy), dim=1)
    return labels, boxes_to_original(detections, geometry, original_hw)


def _preview(batch: Batch, detections: list[Tensor]) -> Preview:
    return Preview(
        batch.indices,
        batch.images.numpy(),
        batch.targets.numpy(),
        [found.cpu().numpy() for found in detections],
    )
