"""The pictures of a run: which ones, under which names, from which figures. Drawing is starling.plots' work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from starling.config.train_config import AUTO_INTERVAL, TrainConfig
from starling.data.dataset import BACKGROUND, Dataset
from starling.data.loader import Batch, ValLoader
from starling.engine.data import TrainingData
from starling.engine.device import Compute
from starling.engine.distributed import SINGLE, Group
from starling.engine.mistakes import WorstImages, draw_worst
from starling.engine.validator import Preview, Validation, validate
from starling.model.detector import Detector
from starling.outputs.atomic import write_atomic

SHOWN_CONFIDENCE = 0.25
PREVIEWS = 3
"""Batches drawn of each kind."""
LABELS = ("labels.jpg", "labels_correlogram.jpg")
BY_EPOCH = "val_batch0_pred"
"""What the first batch of the validation shows as training goes on."""
BY_EPOCH_FOLDER = "epochs"
SHOWN_EPOCHS = 10
"""Epochs drawn of a training, about, where `--bbox_interval` does not say."""


def draw_labels(data: Dataset, folder: Path) -> None:
    """Draw labels.jpg and labels_correlogram.jpg."""
    from starling.plots.labels import plot_labels, plot_labels_correlogram

    labels = np.concatenate(data.labels) if data.labels else np.zeros((0, 5), np.float32)
    names = data.distinct_names
    plot_labels(labels, names, folder / LABELS[0])
    plot_labels_correlogram(labels, names, folder / LABELS[1])


def draw_final(
    model: Detector,
    batches: ValLoader,
    data: TrainingData,
    compute: Compute,
    folder: Path,
    group: Group = SINGLE,
) -> Validation:
    """Validate a finished `model` (in eval mode) on all ranks, draw what it finds, and return the figures."""
    worst = WorstImages()
    validation = validate(model, batches, None, compute, previews=PREVIEWS, on_image=worst.add, group=group)
    found = WorstImages.merged(group.gather(worst))
    if group.is_main:
        draw_validation(validation, data.val, folder)
        draw_worst(found, data.val, data.val_images, folder / "worst.jpg")
    return validation


def is_shown(epoch: int, config: TrainConfig) -> bool:
    """Return whether what is found after this epoch, counted from 0, is drawn: see `--bbox_interval`."""
    every = config.bbox_interval
    if every == AUTO_INTERVAL:
        every = max(1, config.epochs // SHOWN_EPOCHS)
    return every > 0 and (epoch + 1) % every == 0


def draw_epoch(validation: Validation, data: Dataset, folder: Path, epoch: int) -> Path:
    """Draw the first preview's detections into a file of the epoch's own, and return it."""
    path = folder / BY_EPOCH_FOLDER / f"{BY_EPOCH}_epoch{epoch}.jpg"
    _draw_detections(validation.previews[0], data, path)
    return path


def draw_train_batch(batch: Batch, data: Dataset, path: Path) -> None:
    """Draw one augmented batch with its targets."""
    _draw_targets(batch.indices, batch.pixels(), batch.targets.numpy(), data, path)


def draw_validation(validation: Validation, data: Dataset, folder: Path) -> None:
    """Draw val_batch*_{labels,pred}.jpg, the confusion matrix (its counts too) and the curves of the final validation."""
    from starling.plots.curves import plot_confidence_curve, plot_confusion_matrix, plot_pr_curve

    for number, preview in enumerate(validation.previews):
        targets = folder / f"val_batch{number}_labels.jpg"
        _draw_targets(preview.indices, preview.images, preview.targets, data, targets)
        _draw_detections(preview, data, folder / f"val_batch{number}_pred.jpg")
    counts, distinct = validation.confusion.counts, data.distinct_names
    matrix = {"names": [*distinct, BACKGROUND], "counts": counts.tolist()}
    # Before the picture: trackers are told of that one, and look for the counts beside it.
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


def draw_results(results_csv: Path, path: Path, best_epoch: int) -> None:
    """Draw results.png from results.csv; `best_epoch` counts from 0."""
    from starling.plots.results import plot_results

    plot_results(results_csv, path, best_epoch=best_epoch)


def _draw_targets(
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


def _draw_detections(preview: Preview, data: Dataset, path: Path) -> None:
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
