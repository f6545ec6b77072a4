"""Validate a detector: detections, metrics, losses, and a few batches to draw."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from starling.boxes.geometry import xywhn_to_xyxy
from starling.boxes.matching import match_images
from starling.boxes.nms import non_max_suppression
from starling.data.loader.loader import Batch
from starling.device import Compute
from starling.distributed.group import SINGLE, Group
from starling.metrics import ConfusionMatrix, Metrics, average_precision
from starling.model.detector import Detector
from starling.model.loss import Loss
from starling.prediction.inference import Predictor
from starling.prediction.predictor import to_input

CONFIDENCE = 0.001
IOU = 0.6
MAX_DETECTIONS = 300
FIGURES = ("precision", "recall", "mAP50", "mAP50_95")
"""Keys of a validation's figures."""
LOADING, PRE_PROCESS, INFERENCE, LOSS, SUPPRESSION, SCORING = (
    "loading",
    "pre-process",
    "inference",
    "loss",
    "NMS",
    "scoring",
)
"""The stages of a batch; the last part of its scoring runs after the next batch's loss."""


@dataclass(frozen=True, slots=True)
class Preview:
    """One batch to draw, in letterboxed pixels: images, labels and detections."""

    indices: tuple[int, ...]
    images: np.ndarray
    """[B,3,H,W] uint8."""
    targets: np.ndarray
    """[n,6] image, class, xywhn."""
    detections: list[np.ndarray]
    """[m,6] xyxy pixels, confidence, class; one array per image."""


@dataclass(frozen=True, slots=True)
class Validation:
    """The result of one pass over a split."""

    metrics: Metrics
    losses: tuple[float, float, float]
    confusion: ConfusionMatrix
    images: int
    seconds: float
    previews: list[Preview] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ScoredImage:
    """The detections and labels of one image, in the image's own pixels."""

    index: int
    """The position in the dataset."""
    original_hw: tuple[int, int]
    labels: Tensor
    """[n,5] class, xyxy."""
    detections: Tensor
    """[m,6] xyxy, confidence, class; the most confident first."""


@dataclass(frozen=True, slots=True)
class _Matched:
    """One image's detections and labels, matched."""

    position: tuple[int, int]
    """The batch's number and the place in it: the order of a single process, independent of the rank."""
    correct: np.ndarray
    """[m,10] bool."""
    scored: np.ndarray
    """[m,2] confidence, class."""
    actual: np.ndarray
    """[n] class."""


@torch.no_grad()
def validate(
    model: Predictor,
    batches: Iterable[Batch],
    loss: Loss | None,
    compute: Compute,
    *,
    confidence: float = CONFIDENCE,
    iou: float = IOU,
    max_detections: int = MAX_DETECTIONS,
    previews: int = 0,
    after_batch: Callable[[int], None] = lambda images: None,
    on_image: Callable[[ScoredImage], None] | None = None,
    lap: Callable[[str], None] = lambda stage: None,
    group: Group = SINGLE,
) -> Validation:
    """Return metrics of `model` (in eval mode) over `batches`, matched in each image's own pixels.

    Without `loss` the losses are NaN. `after_batch` receives the number of images done so far, `on_image` each image's
    boxes, `lap` the name of each stage at its end. Each rank of a `group` processes its part of every batch; all ranks
    return the figures of the whole, but `on_image` and the previews cover only the rank's own images.
    """
    started = time.monotonic()
    scores = _Scores(ConfusionMatrix(model.nc), previews, on_image)
    # A detector's first layer is a convolution, for which autocast would round the images in the same way.
    inputs = _Inputs(compute, rounded=compute.bfloat16 and isinstance(model, Detector))
    loss_sum = torch.zeros(3, device=compute.device)
    done = iterations = 0
    found: _Found | None = None

    def score() -> None:
        nonlocal done, found
        if found is not None:
            scores.add(found)
            done += found.batch.whole
            found = None
            after_batch(done)
        lap(SCORING)

    for batch in batches:
        lap(LOADING)
        images = inputs.of(batch.images)
        lap(PRE_PROCESS)
        with compute.autocast():
            decoded, raw = model(images)
        lap(INFERENCE)
        if loss is not None:
            targets = batch.targets.to(compute.device, non_blocking=True)
            loss_sum += loss(raw, targets, group.share(batch))[1]
        lap(LOSS)
        score()  # score the previous batch on the host while the GPU runs this batch's forward pass
        detections = []
        if not batch.padding:
            detections = non_max_suppression(
                decoded, confidence, iou, multi_label=model.nc > 1, max_detections=max_detections
            )
        lap(SUPPRESSION)
        iterations += 1
        position = [(iterations, group.rank + index * group.world_size) for index in range(len(detections))]
        found = _Found.of(batch, detections, position)
        lap(SCORING)
    score()
    mean = (group.sum(loss_sum) / iterations).tolist() if loss is not None else [float("nan")] * 3
    parts = group.gather((scores.matched, scores.confusion.counts))
    whole = None
    if group.is_main:
        for _, counts in parts[1:]:
            scores.confusion.counts += counts
        metrics = _score([image for part, _ in parts for image in part])
        seconds = time.monotonic() - started
        whole = Validation(metrics, (mean[0], mean[1], mean[2]), scores.confusion, done, seconds)
    whole = group.from_main(whole)
    assert whole is not None, "rank 0 always has one"
    return replace(whole, previews=scores.drawn)


@dataclass(frozen=True, slots=True)
class _Found:
    """The detections of one batch on the host, all images in one table."""

    batch: Batch
    positions: list[tuple[int, int]]
    """The position of each image, see `_Matched`."""
    boxed: list[Tensor]
    """[m,6] in letterboxed pixels, one tensor per image, on the device."""
    detections: Tensor
    """[m,6] in pixels of the images on disk."""
    image: Tensor
    """[m] the index of each detection's image."""
    correct: Tensor
    """[m,10] bool."""
    labels: Tensor
    """[B,n,5] class, xyxy in the same pixels; padded with class -1."""

    @classmethod
    def of(cls, batch: Batch, boxed: list[Tensor], positions: list[tuple[int, int]]) -> _Found:
        """Match detections with labels on the device, and copy the result to the host."""
        if not boxed:
            nothing = torch.zeros(0)
            return cls(batch, [], [], nothing, nothing, nothing, nothing)
        device = boxed[0].device
        frames, labels = _frames(batch), _labels(batch)
        lengths = torch.tensor([len(rows) for rows in boxed])
        image = torch.arange(len(boxed)).repeat_interleave(lengths)
        detections, there = torch.cat(boxed), image.to(device, non_blocking=True)
        detections = _to_original(detections, frames.to(device, non_blocking=True)[there])
        correct = match_images(detections, there, labels.to(device, non_blocking=True))
        return cls(batch, positions, boxed, detections.cpu(), image, correct.cpu(), labels)


@dataclass(slots=True)
class _Scores:
    """The accumulated scores of one process's images."""

    confusion: ConfusionMatrix
    previews: int
    on_image: Callable[[ScoredImage], None] | None
    matched: list[_Matched] = field(default_factory=list)
    drawn: list[Preview] = field(default_factory=list)

    def add(self, found: _Found) -> None:
        """Add one batch; only a preview waits for the device."""
        if not found.boxed:
            return
        self.confusion.add_images(found.detections, found.image, found.labels)
        lengths = [len(rows) for rows in found.boxed]
        correct, scored = found.correct.numpy(), found.detections[:, 4:].numpy()
        end = 0
        for index, (position, length) in enumerate(zip(found.positions, lengths, strict=True)):
            begin, end = end, end + length
            labels = found.labels[index][found.labels[index, :, 0] >= 0]
            self.matched.append(
                _Matched(position, correct[begin:end], scored[begin:end], labels[:, 0].numpy())
            )
            if self.on_image is not None:
                original_hw = found.batch.original_hw[index]
                rows = found.detections[begin:end]
                self.on_image(ScoredImage(found.batch.indices[index], original_hw, labels, rows))
        if len(self.drawn) < self.previews:
            self.drawn.append(_preview(found.batch, found.boxed))


def _score(images: list[_Matched]) -> Metrics:
    """Return the metrics of all images, in the order of a single process, so equal confidences rank the same."""
    images = sorted(images, key=lambda image: image.position)
    confidence, predicted = np.concatenate([image.scored for image in images]).T
    correct = np.concatenate([image.correct for image in images])
    actual = np.concatenate([image.actual for image in images])
    return average_precision(correct, confidence, predicted, actual)


def class_table(metrics: Metrics, names: Sequence[str], *, classes: bool = True) -> list[str]:
    """Return lines with the figures of all classes together, and with `classes` of each class; `-` without labels."""
    rows: list[tuple[str, int, tuple[float, ...] | None]] = [
        (
            "all",
            int(metrics.labels.sum()),
            (metrics.precision, metrics.recall, metrics.map50, metrics.map5095),
        )
    ]
    if classes:
        rows += [
            (
                row["name"],
                row["labels"],
                None if row["precision"] is None else tuple(row[key] for key in FIGURES),
            )
            for row in class_figures(metrics, names)
        ]
    width = max(len("class"), *(len(row[0]) for row in rows))
    lines = [f"{'class':>{width}}  {'labels':>7}  {'P':>6}  {'R':>6}  {'mAP50':>6}  mAP50-95"]
    for name, labels, figures in rows:
        shown = [f"{figure:.3f}" for figure in figures] if figures else ["-"] * len(FIGURES)
        precision, recall, map50, map5095 = shown
        lines.append(f"{name:>{width}}  {labels:>7}  {precision:>6}  {recall:>6}  {map50:>6}  {map5095:>8}")
    return lines


def class_figures(metrics: Metrics, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return number, name, labels and the four figures of each class; without labels, the figures are None."""
    rows = {int(index): row for row, index in enumerate(metrics.classes)}
    figures: list[dict[str, Any]] = []
    for index, name in enumerate(names):
        row = rows.get(index)
        scores: Sequence[float | None] = [None] * len(FIGURES)
        if row is not None:
            ap = metrics.ap[row]
            scores = [metrics.precision_by_class[row], metrics.recall_by_class[row], ap[0], ap.mean()]
        labels = 0 if row is None else int(metrics.labels[row])
        told = (None if score is None else float(score) for score in scores)
        figures.append(
            {"class": index, "name": name, "labels": labels, **dict(zip(FIGURES, told, strict=True))}
        )
    return figures


class _Inputs:
    """Converts batches to model inputs; on a CPU it reuses memory, because new pages cost several times the work."""

    def __init__(self, compute: Compute, *, rounded: bool = False) -> None:
        self._compute = compute
        self._memory = torch.empty(0, dtype=torch.bfloat16 if rounded else torch.float32)

    def of(self, images: Tensor) -> Tensor:
        """Return the input as `to_input` does, on a CPU possibly in bfloat16; overwrites the previous batch's input."""
        if not self._compute.on_cpu or images.is_floating_point():
            return to_input(images, self._compute)
        if len(self._memory) < images.numel():
            self._memory = torch.empty(images.numel(), dtype=self._memory.dtype)
        batch, channels, height, width = images.shape
        pixels = self._memory[: images.numel()].view(batch, height, width, channels).permute(0, 3, 1, 2)
        return pixels.copy_(images).div_(255)


def _frames(batch: Batch) -> Tensor:
    """Return [B,5] of each image: padding x and y, ratio, and the width and height on disk."""
    assert batch.geometry is not None, "validation batches carry their letterbox"
    return torch.tensor([
        (*geometry.pad_wh, geometry.ratio, width, height)
        for geometry, (height, width) in zip(batch.geometry, batch.original_hw, strict=True)
    ])  # fmt: skip


def _to_original(boxes_xyxy: Tensor, frames: Tensor) -> Tensor:
    """Return boxes [n, 4 or more] mapped from the letterbox to the image, by frames [n,5]; see `boxes_to_original`."""
    pad, ratio, size_wh = frames[:, None, :2], frames[:, 2, None, None], frames[:, None, 3:]
    corners = (boxes_xyxy[:, :4].unflatten(1, (2, 2)) - pad) / ratio
    corners = torch.minimum(corners.clamp_(min=0), size_wh)
    return torch.cat((corners.flatten(1), boxes_xyxy[:, 4:]), dim=1)


def _labels(batch: Batch) -> Tensor:
    """Return [B,n,5] class, xyxy in pixels of the images on disk; padded with class -1."""
    height, width = batch.images.shape[2:]
    targets = batch.targets[batch.targets[:, 0].argsort(stable=True)]
    image = targets[:, 0].long()
    counts = image.bincount(minlength=len(batch.indices))
    place = torch.arange(len(image)) - (counts.cumsum(0) - counts)[image]
    labels = torch.zeros(len(counts), int(counts.max()), 5)
    labels[..., 0] = -1
    boxes_xyxy = _to_original(xywhn_to_xyxy(targets[:, 2:], (height, width)), _frames(batch)[image])
    labels[image, place] = torch.cat((targets[:, 1:2], boxes_xyxy), dim=1)
    return labels


def _preview(batch: Batch, detections: list[Tensor]) -> Preview:
    return Preview(
        batch.indices,
        batch.pixels(),
        batch.targets.numpy(),
        [found.cpu().numpy() for found in detections],
    )
