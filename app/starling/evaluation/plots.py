"""Draw the plots of a validation: its first batches, the confusion matrix, and the curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from starling.core.files.atomic import write_atomic
from starling.data.dataset.dataset import BACKGROUND, Dataset
from starling.evaluation.validator import Preview, Validation

SHOWN_CONFIDENCE = 0.25
PREVIEWS = 3
"""The number of batches drawn with labels and with detections."""


def draw_validation(validation: Validation, data: Dataset, folder: Path) -> None:
    """Draw val_batch*_{labels,pred}.jpg, the confusion matrix and the curves, and write the matrix's counts."""
    from starling.plots.curves import plot_confidence_curve, plot_confusion_matrix, plot_pr_curve

    for number, preview in enumerate(validation.previews):
        targets = folder / f"val_batch{number}_labels.jpg"
        draw_targets(preview.indices, preview.images, preview.targets, data, targets)
        draw_detections(preview, data, folder / f"val_batch{number}_pred.jpg")
    counts, distinct = validation.confusion.counts, data.distinct_names
    matrix = {"names": [*distinct, BACKGROUND], "counts": counts.tolist()}
    # Write the counts before the plot, because trackers read them beside the plot.
    write_atomic(folder / "confusion_matrix.json", json.dumps(matrix))
    plot_confusion_matrix(counts, distinct, folder / "confusion_matrix.png")
    metrics = validation.metrics
    if not len(metrics.classes):
        return
    classes = metrics.classes.tolist()
    names, curves = [distinct[index] for index in classes], metrics.curves
    axis = curves.confidence  # 0 to 1; the recall axis has the same grid
    plot_pr_curve(
        axis, curves.precision_at_recall, metrics.ap, names, folder / "PR_curve.png", classes=classes
    )
    plot_confidence_curve("F1", axis, curves.f1, names, folder / "F1_curve.png", classes=classes)
    plot_confidence_curve("P", axis, curves.precision, names, folder / "P_curve.png", classes=classes)
    plot_confidence_curve("R", axis, curves.recall, names, folder / "R_curve.png", classes=classes)


def draw_targets(
    indices: Sequence[int], images: np.ndarray, targets: np.ndarray, data: Dataset, path: Path
) -> None:
    height, width = images.shape[2:]
    boxes, classes = [], []
    for index in range(len(indices)):
        rows = targets[targets[:, 0] == index]
        half = rows[:, 4:6] / 2
        corners = np.concatenate((rows[:, 2:4] - half, rows[:, 2:4] + half), axis=1)
        boxes.append(corners * np.array([width, height, width, height]))
        classes.append(rows[:, 1].astype(int))
    _plot(images, boxes, classes, None, indices, data, path)


def draw_detections(preview: Preview, data: Dataset, path: Path) -> None:
    shown = [found[found[:, 4] >= SHOWN_CONFIDENCE] for found in preview.detections]
    boxes, scores = [found[:, :4] for found in shown], [found[:, 4] for found in shown]
    classes = [found[:, 5].astype(int) for found in shown]
    _plot(preview.images, boxes, classes, scores, preview.indices, data, path)


def _plot(
    images: np.ndarray,
    boxes: list[np.ndarray],
    classes: list[np.ndarray],
    scores: list[np.ndarray] | None,
    indices: Sequence[int],
    data: Dataset,
    path: Path,
) -> None:
    from starling.plots.batches import plot_batch

    plot_batch(
        images,
        boxes,
        classes,
        scores,
        data.distinct_names,
        [data.images[index].name for index in indices],
        path,
    )
