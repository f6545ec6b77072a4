"""The training and validation splits with their decoded images. A worker loads both once and keeps them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from starling.config.hyp import Hyp
from starling.core.cgroups import container_memory_limit
from starling.core.errors import DataError
from starling.core.settings.train import TrainConfig
from starling.core.units import format_duration
from starling.data.augment.device_paint import DevicePainter
from starling.data.cache.store import ImageStore
from starling.data.dataset.account import left_out
from starling.data.dataset.dataset import Dataset, DatasetDescription
from starling.data.dataset.findings import REPORT, write_report
from starling.data.dataset.unlabelled import check_boxes, explain_no_box
from starling.data.fetch.acquire import acquire
from starling.data.fetch.find import find_dataset
from starling.data.loader.batching import Batching
from starling.data.loader.loader import TrainLoader, ValLoader
from starling.device import Compute
from starling.distributed.group import SINGLE, Group
from starling.evaluation.evaluation import cut_list
from starling.evaluation.validator import CONFIDENCE, MAX_DETECTIONS
from starling.model.detector import Detector
from starling.progress import aloud, console

logger = logging.getLogger(__name__)

DEVICE_SHARE = {"auto": 0.25, "device": 0.6}
"""Share of the GPU's free memory that decoded images may take, by `--cache`."""
CACHE_SHARE = 0.5
"""Share of the container's memory that decoded images may take; the rest is for training."""


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Both splits and their decoded images."""

    train: Dataset
    val: Dataset
    train_images: ImageStore
    val_images: ImageStore
    names: tuple[str, ...]
    train_painter: DevicePainter | None = None
    """Paints training images on the GPU; None if the decoded images are not on the GPU."""
    val_painter: DevicePainter | None = None

    @property
    def cut(self) -> str | None:
        """The sentence that says how the validations' lists of detections are cut; None if they are complete."""
        return cut_list(self.val, CONFIDENCE, MAX_DETECTIONS)

    def account(self) -> dict[str, Any]:
        """Return the `--json` fields of the data: `left_out` for both splits, and `cut_list`."""
        splits = {"train": self.train, "val": self.val}
        left_out = {name: split.left_out.as_list() for name, split in splits.items()}
        return {"cut_list": self.cut, "left_out": left_out}


def load_data(
    config: TrainConfig,
    image_size: int,
    cache_folder: Path,
    processes: int = 1,
    *,
    device_free_bytes: int | None = None,
) -> TrainingData:
    """Read the splits that `--data` describes; raises DataError or UsageError with the file and the problem.

    `processes` on this host share its memory. `device_free_bytes` is how much of the GPU's memory decoded images may
    take; None without a GPU.
    """
    description = _describe(config)
    train, val = (Dataset.load(description, split, strict=config.strict) for split in ("train", "val"))
    check_boxes(description, "train", train)
    if not val.boxes:
        logger.warning(
            f"warning: {explain_no_box(description, 'val', val, 'score')}\n  validation scores 0 without labels"
        )
    budget = int(container_memory_limit() * CACHE_SHARE / processes)
    stores = []
    for name, split in (("train", train), ("val", val)):
        parts = len(split) if config.cache == "val" else len(train) + len(val)
        share = budget * len(split) // parts
        mode = config.cache if config.cache != "val" else "ram" if name == "val" else "off"
        store = ImageStore(
            split,
            image_size,
            mode,
            memory_limit_bytes=share,
            cache_folder=cache_folder,
            device_free_bytes=device_free_bytes,
            progress=_show_decoding(name),
        )
        if device_free_bytes is not None and store.on_device:
            device_free_bytes -= store.nbytes
        stores.append(store)
        logger.info(f"{name}: {len(split)} images, {split.boxes} boxes; decoded images: {store.reason}")
        for line in left_out(split):
            logger.warning(line)
    data = TrainingData(train, val, stores[0], stores[1], description.names)
    if data.cut:
        logger.info(f"val: {data.cut}")
    return data


def bring_to_device(data: TrainingData, compute: Compute) -> TrainingData:
    """Return the data with its images on the GPU too, as far as their stores say that they fit."""
    dtype = torch.bfloat16 if compute.bfloat16 else torch.float32
    painters: list[DevicePainter | None] = [None, None]
    for number, store in enumerate((data.train_images, data.val_images)):
        if not store.on_device:
            continue
        try:
            painters[number] = painter = DevicePainter.from_store(store, compute.device, dtype=dtype)
        except torch.OutOfMemoryError:
            logger.warning("decoded images do not fit into the GPU's memory after all; augmenting on the CPU")
            break
        if number == 0:
            logger.info(f"augmentation on the GPU, painted by {painter.kernel}: {painter.reason}")
    return replace(data, train_painter=painters[0], val_painter=painters[1])


def _show_decoding(name: str) -> Callable[[int, int], None]:
    """Return what shows how far the decoding of a split is, and at its end says how long it took."""
    began = time.monotonic()

    def show(done: int, total: int) -> None:
        taken = time.monotonic() - began
        with aloud() as progress:
            if done == total:
                logger.info(f"{name}: {total} images decoded in {format_duration(taken)}")
                return
            left = format_duration(taken / done * (total - done))
            progress.show(lambda: f"{name}: {done}/{total} images decoded, {left} left")

    return show


def _describe(config: TrainConfig) -> DatasetDescription:
    """Read the description; fetch a dataset that is not there from ClearML, or under `--download`."""
    path = find_dataset(config.data, console().aloud.show)
    try:
        return DatasetDescription.from_yaml(path, single_cls=config.single_cls)
    except DataError:
        if not config.download:
            raise
    acquire(path, show=console().aloud.show)
    return DatasetDescription.from_yaml(path, single_cls=config.single_cls)


def training_loader(
    data: TrainingData,
    model: Detector,
    config: TrainConfig,
    hyp: Hyp,
    image_size: int,
    compute: Compute,
    group: Group = SINGLE,
) -> TrainLoader:
    """Return this rank's part of the augmented training batches."""
    return TrainLoader(
        data.train,
        data.train_images,
        hyp=hyp,
        image_size=image_size,
        batch_size=config.batch_size,
        seed=config.seed,
        workers=compute.loader_threads(config.workers),
        pin_memory=not compute.on_cpu,
        batching=Batching.from_config(config, model.image_multiple),
        rank=group.rank,
        world_size=group.world_size,
        painter=data.train_painter,
        mosaics_end=config.epochs - round(hyp.close_mosaic or 0),
    )


def validation_loader(
    data: TrainingData,
    model: Detector,
    config: TrainConfig,
    image_size: int,
    compute: Compute,
    group: Group = SINGLE,
) -> ValLoader:
    """Return this rank's part of the validation split in letterboxed batches.

    A validation batch has twice the training's batch size: without a backward pass, no activations are kept.
    """
    return ValLoader(
        data.val,
        data.val_images,
        image_size=image_size,
        batch_size=config.batch_size * 2,
        stride=model.image_multiple,
        workers=compute.loader_threads(config.workers),
        pin_memory=not compute.on_cpu,
        rank=group.rank,
        world_size=group.world_size,
        painter=data.val_painter,
    )


def report_findings(data: TrainingData, folder: Path) -> None:
    """Write all that is wrong with images and labels to labels_report.csv in `folder`, and say so."""
    # An image may be in both splits.
    count = write_report(folder / REPORT, dict.fromkeys((*data.train.findings, *data.val.findings)))
    if count:
        logger.warning(f"images and labels: {count} things to look at, all in {folder / REPORT}")
