"""Choose the images of an epoch, their batches and shapes: functions of (seed, epoch) and the classes' mAP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from starling.core.errors import ConfigError
from starling.core.settings.train import TrainConfig
from starling.data.augment.letterbox import Size
from starling.data.augment.streams import decision_stream, epoch_order
from starling.data.dataset.dataset import Dataset

Array = np.ndarray[Any, Any]

SCALES = (0.5, 1.5)
"""Smallest and largest size of multi-scale training, as fractions of the image size."""
GROUP = 4
"""Number of dataset images that quad joins in one training image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batching:
    """How `--rect`, `--quad`, `--image-weights` and `--multi-scale` shape the batches of an epoch."""

    rect: bool = False
    """Batches of images with similar aspect, each in the smallest shape that holds its images; no mosaics."""
    quad: bool = False
    """A quarter of the images at twice the side: each is one dataset image enlarged, or four in two rows of two."""
    image_weights: bool = False
    """Draw images by their classes: images of rare classes and of classes with low mAP are drawn more often."""
    multi_scale: bool = False
    """Another image size in each iteration."""
    stride: int = 32
    """Every side in pixels is a multiple of this number."""

    @classmethod
    def from_config(cls, config: TrainConfig, stride: int) -> Batching:
        """Return the batching that the flags ask for."""
        return cls(
            rect=config.rect,
            quad=config.quad,
            image_weights=config.image_weights,
            multi_scale=config.multi_scale,
            stride=stride,
        )

    def check(self, batch_size: int) -> None:
        """Raise ConfigError if batches of this size cannot be made."""
        if self.stride < 1:
            raise ConfigError("stride", self.stride, "must be at least 1")
        if self.quad and batch_size % GROUP:
            raise ConfigError("--batch-size", batch_size, f"must be a multiple of {GROUP} with --quad")


class Visit(NamedTuple):
    """One showing of an image."""

    image: int
    """Index of the image in the dataset."""
    repeat: int
    """Number of earlier showings of the image in the epoch."""


class Slot(NamedTuple):
    """The content of one training image of a batch."""

    visits: tuple[Visit, ...]
    enlarged: bool
    """Whether the first visit is shown at twice the side; otherwise all visits are shown side by side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """The content of one batch."""

    slots: tuple[Slot, ...]
    source_hw: Size
    """Height and width in pixels of each dataset image."""
    hw: Size
    """Height and width in pixels of each training image; twice `source_hw` with quad."""
    scaled_hw: Size | None
    """Size that the images are resized to on the device; None for no resizing."""


def plan_epoch(
    batching: Batching,
    dataset: Dataset,
    class_maps: Sequence[float] | None,
    *,
    image_size: int,
    batch_size: int,
    seed: int,
    epoch: int,
) -> list[BatchPlan]:
    """Return the batches of one epoch; the same arguments give the same batches.

    `class_maps` holds the mAP of each class in the last validation, None before the first validation.
    """
    count = len(dataset)
    if batching.image_weights:
        weights = image_weights(dataset.labels, dataset.nc, class_maps)
        order = decision_stream(seed, epoch, "images").choice(count, count, p=weights)
    else:
        order = epoch_order(seed, epoch, count)
    aspects = dataset.shapes_hw[:, 0] / dataset.shapes_hw[:, 1]
    if batching.rect:
        order = order[np.argsort(aspects[order], kind="stable")]
    visits = _visits(order.tolist())
    batches = [visits[first : first + batch_size] for first in range(0, count, batch_size)]
    if batching.rect:  # aspects are similar within a batch, but not sorted from batch to batch
        batches = [
            batches[i] for i in decision_stream(seed, epoch, "batches").permutation(len(batches)).tolist()
        ]
    enlarge = decision_stream(seed, epoch, "quad").random((len(batches), batch_size)) < 0.5
    scales = decision_stream(seed, epoch, "scale").random(len(batches)).tolist()
    plans = []
    for iteration, batch in enumerate(batches):
        hw = (image_size, image_size)
        if batching.rect:
            indices = [visit.image for visit in batch]
            hw = rectangle(aspects[indices], image_size, batching.stride, pad=0)
        scale = _scale(scales[iteration], image_size, batching.stride) if batching.multi_scale else 1.0
        plans.append(_plan_batch(batching, batch, hw, enlarge[iteration].tolist(), scale))
    return plans


def _plan_batch(
    batching: Batching, visits: list[Visit], hw: Size, enlarge: list[bool], scale: float
) -> BatchPlan:
    slots = tuple(Slot((visit,), False) for visit in visits)
    out_hw = hw
    if batching.quad:
        out_hw = (2 * hw[0], 2 * hw[1])
        groups = [visits[first : first + GROUP] for first in range(0, len(visits), GROUP)]
        slots = tuple(Slot(tuple(group), enlarge[number]) for number, group in enumerate(groups))
    scaled_hw = tuple(math.ceil(side * scale / batching.stride - 1e-9) * batching.stride for side in out_hw)
    return BatchPlan(
        slots=slots,
        source_hw=hw,
        hw=out_hw,
        scaled_hw=(scaled_hw[0], scaled_hw[1]) if scaled_hw != out_hw else None,
    )


def _visits(order: list[int]) -> list[Visit]:
    shown: dict[int, int] = {}
    visits = []
    for index in order:
        visits.append(Visit(index, shown.get(index, 0)))
        shown[index] = shown.get(index, 0) + 1
    return visits


def _scale(uniform: float, image_size: int, stride: int) -> float:
    """Return a random size in SCALES, as a fraction of the image size: a whole number of strides, at least two."""
    smallest = max(math.ceil(SCALES[0] * image_size / stride), 2)
    largest = max(int(SCALES[1] * image_size / stride), smallest)
    return (smallest + int(uniform * (largest - smallest + 1))) * stride / image_size


def rectangle(aspects: Array, image_size: int, stride: int, pad: float) -> Size:
    """Return the shape, plus `pad` strides, that holds images of these height/width ratios."""
    flattest, tallest = float(aspects.min()), float(aspects.max())
    height, width = 1.0, 1.0
    if tallest < 1:
        height = tallest
    elif flattest > 1:
        width = 1 / flattest
    strides = image_size / stride
    return math.ceil(height * strides + pad) * stride, math.ceil(width * strides + pad) * stride


def image_weights(labels: Sequence[Array], nc: int, class_maps: Sequence[float] | None) -> Array:
    """Return the probability [N] of drawing each image: the sum of class weight·(1 - mAP)² over its labels.

    A class's weight is one over its number of labels. Images without labels are not drawn, unless no image
    has a label.
    """
    counts = np.array([len(rows) for rows in labels])
    classes = np.concatenate([rows[:, 0] for rows in labels]).astype(int)
    found = np.zeros(nc) if class_maps is None else np.asarray(class_maps, float)
    gains = (1 - found) ** 2 / np.maximum(np.bincount(classes, minlength=nc), 1)
    owners = np.repeat(np.arange(len(labels)), counts)
    weights: Array = np.bincount(owners, gains[classes], minlength=len(labels))
    if weights.sum() <= 0:
        weights = np.ones(len(labels))
    return weights / weights.sum()
