"""Score detections: precision and recall, average precision, fitness, confusion matrix."""

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
"""The number of points of COCO's interpolated precision."""
CURVE_POINTS = 1000
F1_SMOOTHING = 0.1
"""The part of the confidence axis that the box filter over F1 covers."""
_EPS = 1e-16


def find_mistakes(
    detections: Tensor, labels: Tensor, iou: float = IOU_THRESHOLDS[0]
) -> tuple[Tensor, Tensor]:
    """Return the missed labels [n] bool and the false detections [m] bool at one IoU threshold.

    The arguments are those of `match_detections`; a second detection of the same label is false.
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
    """The data of the four curve plots, for C classes and 1000 points."""

    confidence: Floats
    """[1000] from 0 to 1: the axis of precision, recall and F1."""
    precision: Floats
    """[C,1000]."""
    recall: Floats
    """[C,1000]."""
    f1: Floats
    """[C,1000]."""
    precision_at_recall: Floats
    """[C,1000] at IoU 0.5, over recall from 0 to 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """Scores of one evaluation. Arrays have one row for each class with labels; `classes` are the class numbers."""

    classes: NDArray[np.int64]
    labels: NDArray[np.int64]
    """[C] the number of labels per class."""
    precision_by_class: Floats
    """[C] at `confidence`."""
    recall_by_class: Floats
    f1_by_class: Floats
    ap: Floats
    """[C,10] average precision at IoU 0.50 to 0.95."""
    confidence: float
    """The confidence at which the smoothed mean F1 is best."""
    curves: Curves

    @property
    def precision(self) -> float:
        """Mean precision over classes at `confidence`."""
        return _mean(self.precision_by_class)

    @property
    def recall(self) -> float:
        """Mean recall over classes at `confidence`."""
        return _mean(self.recall_by_class)

    @property
    def f1(self) -> float:
        """Mean F1 over classes at `confidence`."""
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
        """The fitness of these scores, see the function `fitness`."""
        return fitness(self.map50, self.map5095)

    def map_by_class(self, nc: int) -> Floats:
        """Return [nc] mAP50-95 of each class; a class without labels gets the mean."""
        scores = np.full(nc, self.map5095)
        scores[self.classes] = self.ap.mean(1)
        return scores


def fitness(map50: float, map5095: float) -> float:
    """Return the score that training and search maximise: 0.1 mAP50 + 0.9 mAP50-95."""
    return 0.1 * map50 + 0.9 * map5095


def average_precision(
    correct: NDArray[np.bool_],
    confidence: NDArray[np.floating],
    predicted: NDArray[np.floating],
    actual: NDArray[np.floating],
) -> Metrics:
    """Score the detections of a whole dataset.

    `correct` [m,10] from `match_detections`, `confidence` [m], `predicted` [m] classes, `actual` [n] classes of all
    labels. Precision is interpolated at 101 recalls, as in COCO. Without labels every mean is 0.
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

    Beyond the last recall the precision is 0, as in COCO: a label that no detection matches never scores.
    """
    x = np.concatenate(([0.0], recalls, [recalls[-1], 1.0]))
    y = np.concatenate(([1.0], precisions, [0.0, 0.0]))
    envelope = np.maximum.accumulate(y[::-1])[::-1]
    grid = np.linspace(0, 1, RECALL_POINTS)
    return float(np.trapezoid(np.interp(grid, x, envelope), grid)), (x, envelope)


def _smooth(values: Floats, part: float) -> Floats:
    """Return the running mean over `part` of the values; the ends are padded with the end values."""
    width = round(len(values) * part * 2) // 2 + 1
    ends = width // 2
    padded = np.concatenate((np.full(ends, values[0]), values, np.full(ends, values[-1])))
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else 0.0


@dataclass(slots=True)
class ConfusionMatrix:
    """Counts predicted and actual classes: rows are predicted, columns actual; the last of both is background."""

    nc: int
    confidence: float = 0.25
    """Detections at or below this confidence are left out."""
    iou: float = 0.45
    """A detection and a label can be paired above this IoU."""
    counts: NDArray[np.int64] = field(init=False)
    """[nc+1, nc+1]."""

    def __post_init__(self) -> None:
        """Set all counts to zero."""
        self.counts = np.zeros((self.nc + 1, self.nc + 1), dtype=np.int64)

    def add(self, detections: Tensor, labels: Tensor) -> None:
        """Count one image: `detections` [m,6] xyxy, confidence, class; `labels` [n,5] class, xyxy.

        Detections and labels of any classes are paired in falling order of overlap; each box is in at most one pair.
        """
        self.add_images(detections, torch.zeros(len(detections), dtype=torch.long), labels[None])

    def add_images(self, detections: Tensor, image: Tensor, labels: Tensor) -> None:
        """Count several images; the arguments are those of `match_images`."""
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
