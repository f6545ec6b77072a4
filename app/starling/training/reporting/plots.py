"""The plots of a run: which ones, under which file names, from which figures. `starling.plots` does the drawing."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from starling.core.settings.train import AUTO_INTERVAL, TrainConfig
from starling.data.dataset.dataset import Dataset
from starling.data.loader.loader import Batch, ValLoader
from starling.device import Compute
from starling.distributed.group import SINGLE, Group
from starling.evaluation.mistakes import WorstImages, draw_worst
from starling.evaluation.plots import PREVIEWS, draw_detections, draw_targets, draw_validation
from starling.evaluation.validator import Validation, validate
from starling.model.detector import Detector
from starling.training.setup.data import TrainingData

LABELS = ("labels.jpg", "labels_correlogram.jpg")
BY_EPOCH = "val_batch0_pred"
"""Name of the series of plots that shows the detections in the first validation batch, epoch by epoch."""
BY_EPOCH_FOLDER = "epochs"
SHOWN_EPOCHS = 10
"""Approximate number of epochs drawn in a training if `--bbox_interval` is automatic."""


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
    """Validate a finished `model` (in eval mode) on all ranks, draw detections and curves, return the validation."""
    worst = WorstImages()
    validation = validate(model, batches, None, compute, previews=PREVIEWS, on_image=worst.add, group=group)
    found = WorstImages.merged(group.gather(worst))
    if group.is_main:
        draw_validation(validation, data.val, folder)
        draw_worst(found, data.val, data.val_images, folder / "worst.jpg")
    return validation


def is_shown(epoch: int, config: TrainConfig) -> bool:
    """Return whether the detections after `epoch` (counted from 0) are drawn, as `--bbox_interval` asks."""
    every = config.bbox_interval
    if every == AUTO_INTERVAL:
        every = max(1, config.epochs // SHOWN_EPOCHS)
    return every > 0 and (epoch + 1) % every == 0


def draw_epoch(validation: Validation, data: Dataset, folder: Path, epoch: int) -> Path:
    """Draw the detections of the first preview into a file named after the epoch, and return the file."""
    path = folder / BY_EPOCH_FOLDER / f"{BY_EPOCH}_epoch{epoch}.jpg"
    draw_detections(validation.previews[0], data, path)
    return path


def draw_train_batch(batch: Batch, data: Dataset, path: Path) -> None:
    """Draw one augmented batch with its targets."""
    draw_targets(batch.indices, batch.pixels(), batch.targets.numpy(), data, path)


def draw_results(results_csv: Path, path: Path, best_epoch: int) -> None:
    """Draw results.png from results.csv; `best_epoch` counts from 0."""
    from starling.plots.results import plot_results

    plot_results(results_csv, path, best_epoch=best_epoch)
