"""Validate a detector: detections, metrics, losses, and a few batches to draw."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from app.boxes import non_max_suppression, xywhn_to_xyxy
from app.data.letterbox import Size, boxes_to_original
from app.data.loader import Batch
from app.engine.device import Compute
from app.engine.distributed import SINGLE, Group
from app.engine.inference import Predictor
from app.loss import DetectionLoss
from app.metrics import ConfusionMatrix, Metrics, average_precision, match_detections

CONFIDENCE = 0.001
IOU = 0.6
MAX_DETECTIONS = 300
LOADING, PRE_PROCESS, INFERENCE, SUPPRESSION, SCORING = (
    "loading",
    "pre-process",
    "inference",
    "NMS",
    "scoring",
)
"""Stages of a batch, in their order."""


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


@dataclass(frozen=True, slots=True)
class ScoredImage:
    """What was found in one picture and what is there, in the picture's own pixels."""

    index: int
    """Position in the dataset."""
    original_hw: tuple[int, int]
    labels: Tensor
    """[n,5] class, xyxy."""
    detections: Tensor
    """[m,6] xyxy, confidence, class; the most confident first."""


@dataclass(frozen=True, slots=True)
class _Matched:
    """One picture's detections and labels, matched."""

    position: tuple[int, int]
    """Number of the batch, place in it: the order of one process, whichever rank did it."""
    correct: Tensor
    """[m,10] bool."""
    scored: Tensor
    """[m,2] confidence, class."""
    actual: Tensor
    """[n] class."""


@torch.no_grad()
def validate(
    model: Predictor,
    batches: Iterable[Batch],
    loss: DetectionLoss | None,
    compute: Compute,
    *,
    confidence: float = CONFIDENCE,
    iou: float = IOU,
    max_detections: int = MAX_DETECTIONS,
    previews: int = 0,
    after_batch: Callable[[int], None] = lambda images: None,
    on_image: Callable[[ScoredImage], None] = lambda image: None,
    lap: Callable[[str], None] = lambda stage: None,
    group: Group = SINGLE,
) -> Validation:
    """Return metrics of `model` (in eval mode) over `batches`, matched in each picture's own pixels.

    `loss` None leaves the losses NaN. `after_batch` is told the number of images done so far, `on_image` each
    picture's boxes, `lap` the name of each stage as it ends. The ranks of a `group` each do their part of every
    batch; all get the figures of the whole, while `on_image` and the previews are of the rank's own pictures.
    """
    started = time.monotonic()
    matched: list[_Matched] = []
    confusion = ConfusionMatrix(model.nc)
    loss_sum = torch.zeros(3, device=compute.device)
    drawn: list[Preview] = []
    done = iterations = 0
    for batch in batches:
        lap(LOADING)
        images = to_input(batch.images, compute)
        lap(PRE_PROCESS)
        with compute.autocast():
            decoded, raw = model(images)
        lap(INFERENCE)
        if loss is not None:
            loss_sum += loss(raw, batch.targets.to(compute.device), group.share(batch))[1]
        iterations += 1
        detections = []
        if not batch.padding:
            detections = non_max_suppression(
                decoded, confidence, iou, multi_label=model.nc > 1, max_detections=max_detections
            )
        lap(SUPPRESSION)
        for index, found in enumerate(detections):
            labels, found_original = _in_original_pixels(batch, index, found.cpu())
            confusion.add(found_original, labels)
            correct = match_detections(found_original, labels)
            position = (iterations, group.rank + index * group.world_size)
            matched.append(_Matched(position, correct, found_original[:, 4:], labels[:, 0]))
            on_image(ScoredImage(batch.indices[index], batch.original_hw[index], labels, found_original))
        if detections and len(drawn) < previews:
            drawn.append(_preview(batch, detections))
        done += batch.whole
        after_batch(done)
        lap(SCORING)
    mean = (group.sum(loss_sum) / iterations).tolist() if loss is not None else [float("nan")] * 3
    parts = group.gather((matched, confusion.counts))
    whole = None
    if group.is_main:
        for _, counts in parts[1:]:
            confusion.counts += counts
        metrics = _score([picture for part, _ in parts for picture in part])
        whole = Validation(metrics, (mean[0], mean[1], mean[2]), confusion, done, time.monotonic() - started)
    whole = group.from_main(whole)
    assert whole is not None, "rank 0 always has one"
    return replace(whole, previews=drawn)


def _score(pictures: list[_Matched]) -> Metrics:
    """Return the metrics of all pictures; in one process's order, so that equal confidences rank alike."""
    pictures = sorted(pictures, key=lambda picture: picture.position)
    confidence, predicted = torch.cat([picture.scored for picture in pictures]).numpy().T
    correct = torch.cat([picture.correct for picture in pictures]).numpy()
    actual = torch.cat([picture.actual for picture in pictures]).numpy()
    return average_precision(correct, confidence, predicted, actual)


def class_table(metrics: Metrics, names: Sequence[str], *, classes: bool = True) -> list[str]:
    """Return lines with the figures of all classes together, and with `classes` of each that has labels."""
    rows: list[tuple[str, int, float, float, float, float]] = [
        ("all", int(metrics.labels.sum()), metrics.precision, metrics.recall, metrics.map50, metrics.map5095)
    ]
    if classes:
        for row, index in enumerate(metrics.classes):
            ap = metrics.ap[row]
            precision, recall = metrics.precision_by_class[row], metrics.recall_by_class[row]
            rows.append((names[index], int(metrics.labels[row]), precision, recall, ap[0], ap.mean()))
    width = max(len("class"), *(len(row[0]) for row in rows))
    lines = [f"{'class':>{width}}  {'labels':>7}  {'P':>6}  {'R':>6}  {'mAP50':>6}  mAP50-95"]
    for name, labels, precision, recall, map50, map5095 in rows:
        lines.append(
            f"{name:>{width}}  {labels:>7}  {precision:6.3f}  {recall:6.3f}  {map50:6.3f}  {map5095:8.3f}"
        )
    return lines


def to_input(images: Tensor, compute: Compute, scaled_hw: Size | None = None) -> Tensor:
    """Return images [B,3,H,W] as 0..1 on the device, channels last, resized to `scaled_hw` if given.

    uint8 becomes float32; what a painter has put there already stays as it is.
    """
    pixels = images.to(compute.device, non_blocking=True)
    if images.dtype == torch.uint8:
        pixels = pixels.to(torch.float32, memory_format=torch.channels_last).div_(255)
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
        batch.pixels(),
        batch.targets.numpy(),
        [found.cpu().numpy() for found in detections],
    )
