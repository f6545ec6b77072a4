"""Score detections: precision and recall, average precision, fitness, confusion."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from starling.boxes.geometry import iou_matrix
from starling.boxes.matching import IOU_THRESHOLDS, match_detections

Floats = NDArray[np.float64]

RECALL_POINTS = 101
"""Points of COCO's interpolated precision."""
CURVE_POINTS = 1000
F1_SMOOTHING = 0.1
"""Part of the confidence axis that the box filter over F1 covers."""
_EPS = 1e-16


def find_mistakes(
    detections: Tensor, labels: Tensor, iou: float = IOU_THRESHOLDS[0]
) -> tuple[Tensor, Tensor]:
    """Return which labels [n] bool are missed and which detections [m] bool are false, at one IoU.

    Takes what `match_detections` takes; a second box on a label that is found is false.
    """
    right = match_detections(detections, labels, (iou,))[:, 0]
    missed = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    if right.any():
        hits = detections[right]
        same_class = hits[:, 5:6] == labels[:, 0][None]
        missed[(iou_matrix(hits[:, :4], labels[:, 1:5]) * same_class).argmax(1)] = False
    return missed, ~right


@dataclass(frozen=True, kw_only=True, slots=True)
class Curves:
    """What the four curve plots draw; C classes, 1000 points."""

    confidence: Floats
    """[1000] 0 to 1; the axis of precision, recall and F1."""
    precision: Floats
    """[C,1000]."""
    recall: Floats
    """[C,1000]."""
    f1: Floats
    """[C,1000]."""
    precision_at_recall: Floats
    """[C,1000] at IoU 0.5, against recall on `confidence`'s grid."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """Scores of one evaluation. Arrays have one row for each class that has labels, named by `classes`."""

    classes: NDArray[np.int64]
    labels: NDArray[np.int64]
    """[C] labels a class."""
    precision_by_class: Floats
    """[C] at `confidence`."""
    recall_by_class: Floats
    f1_by_class: Floats
    ap: Floats
    """[C,10] average precision at IoU 0.50 to 0.95."""
    confidence: float
    """Where the smoothed mean F1 is best."""
    curves: Curves

    @property
    def precision(self) -> float:
        """Mean over classes at the best F1."""
        return _mean(self.precision_by_class)

    @property
    def recall(self) -> float:
        """Mean over classes at the best F1."""
        return _mean(self.recall_by_class)

    @property
    def f1(self) -> float:
        """Mean over classes at the best F1."""
        return _mean(self.f1_by_class)

    @property
    def map50(self) -> float:
        """Mean average precision at IoU 0.5."""
        return _mean(self.ap[:, 0])

    @property
    def map5095(self) -> float:
        """Mean average precision over IoU 0.50 to 0.95."""
        return _mean(self.ap)

    @property
    def fitness(self) -> float:
        """See `fitness`."""
        return fitness(self.map50, self.map5095)

    def map_by_class(self, nc: int) -> Floats:
        """Return [nc] mAP50-95 of each class, the mean where a class has no labels."""
        scores = np.full(nc, self.map5095)
        scores[self.classes] = self.ap.mean(1)
        return scores


def fitness(map50: float, map5095: float) -> float:
    """Return what training and search maximise: 0.1 mAP50 + 0.9 mAP50-95."""
    return 0.1 * map50 + 0.9 * map5095


def average_precision(
    correct: NDArray[np.bool_],
    confidence: NDArray[np.floating],
    predicted: NDArray[np.floating],
    actual: NDArray[np.floating],
) -> Metrics:
    """Score the detections of a whole dataset.

    `correct` [m,10] from `match_detections`, `confidence` [m], `predicted` [m] classes, `actual` [n] classes of all
    labels. Interpolated at 101 recalls as COCO does. Without labels every mean is 0.
    """
    order = np.argsort(-confidence, kind="stable")
    correct, confidence, predicted = correct[order], confidence[order], predicted[order]
    classes, counts = np.unique(np.asarray(actual), return_counts=True)
    grid = np.linspace(0, 1, CURVE_POINTS)
    shape = (len(classes), CURVE_POINTS)
    precision, recall, at_recall = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    ap = np.zeros((len(classes), correct.shape[1]))
    for row, (label, count) in enumerate(zip(classes, counts, strict=True)):
        mine = predicted == label
        if not mine.any():
            continue
        hits = correct[mine].cumsum(0)
        recalls = hits / (count + _EPS)
        precisions = hits / np.arange(1, len(hits) + 1)[:, None]
        falling = -confidence[mine]
        recall[row] = np.interp(-grid, falling, recalls[:, 0], left=0)
        precision[row] = np.interp(-grid, falling, precisions[:, 0], left=1)
        for column in range(correct.shape[1]):
            ap[row, column], envelope = _area(recalls[:, column], precisions[:, column])
            if column == 0:
                at_recall[row] = np.interp(grid, *envelope)
    f1 = 2 * precision * recall / (precision + recall + _EPS)
    best = int(_smooth(f1.mean(0), F1_SMOOTHING).argmax()) if len(classes) else 0
    return Metrics(
        classes=classes.astype(np.int64),
        labels=counts.astype(np.int64),
        precision_by_class=precision[:, best],
        recall_by_class=recall[:, best],
        f1_by_class=f1[:, best],
        ap=ap,
        confidence=float(grid[best]),
        curves=Curves(
            confidence=grid, precision=precision, recall=recall, f1=f1, precision_at_recall=at_recall
        ),
    )


def _area(recalls: Floats, precisions: Floats) -> tuple[float, tuple[Floats, Floats]]:
    """Return the area under the falling envelope of precision over recall, and the envelope (Everingham et al.).

    Beyond the last recall the precision is 0, as COCO counts it: a label that no detection finds never scores.
    """
    x = np.concatenate(([0.0], recalls, [recalls[-1], 1.0]))
    y = np.concatenate(([1.0], precisions, [0.0, 0.0]))
    envelope = np.maximum.accumulate(y[::-1])[::-1]
    grid = np.linspace(0, 1, RECALL_POINTS)
    return float(np.trapezoid(np.interp(grid, x, envelope), grid)), (x, envelope)


def _smooth(values: Floats, part: float) -> Floats:
    """Return the running mean over `part` of the values, the ends held."""
    width = round(len(values) * part * 2) // 2 + 1
    ends = width // 2
    padded = np.concatenate((np.full(ends, values[0]), values, np.full(ends, values[-1])))
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else 0.0


@dataclass(slots=True)
class ConfusionMatrix:
    """Count which class was found as which; row predicted, column actual, the last of both is background."""

    nc: int
    confidence: float = 0.25
    """Detections at or below it are left out."""
    iou: float = 0.45
    """A detection and a label meet above it."""
    counts: NDArray[np.int64] = field(init=False)
    """[nc+1, nc+1]."""

    def __post_init__(self) -> None:
        """Start at zero."""
        self.counts = np.zeros((self.nc + 1, self.nc + 1), dtype=np.int64)

    def add(self, detections: Tensor, labels: Tensor) -> None:
        """Count one image: `detections` [m,6] xyxy, confidence, class; `labels` [n,5] class, xyxy.

        Pairs of any classes are made in the order of their overlap, each box in one pair at most.
        """
        self.add_images(detections, torch.zeros(len(detections), dtype=torch.long), labels[None])

    def add_images(self, detections: Tensor, image: Tensor, labels: Tensor) -> None:
        """Count several images; takes what `match_images` takes."""
        sure = detections[:, 4] > self.confidence
        detections, image, labels = detections[sure].cpu(), image[sure.to(image.device)].cpu(), labels.cpu()
        found, actual = detections[:, 5].long().numpy(), labels[..., 0].long().numpy()
        overlap = iou_matrix(detections[:, None], labels[image][..., 1:5])[:, 0].numpy()
        rows, columns = np.nonzero((overlap > self.iou) & (actual[image.numpy()] >= 0))
        order = np.lexsort((rows, columns, -overlap[rows, columns]))
        paired, missed = np.zeros(len(found), dtype=bool), actual >= 0
        for row, owner, column in zip(
            rows[order].tolist(), image.numpy()[rows[order]].tolist(), columns[order].tolist(), strict=True
        ):
            if missed[owner, column] and not paired[row]:
                missed[owner, column], paired[row] = False, True
                self.counts[found[row], actual[owner, column]] += 1
        np.add.at(self.counts[self.nc], actual[missed], 1)
        np.add.at(self.counts[:, self.nc], found[~paired], 1)

    def normalised(self) -> Floats:
        """Return [nc+1, nc+1] with each column a fraction of its actual class; an empty column is 0."""
        return self.counts / np.maximum(self.counts.sum(0, keepdims=True), 1)
