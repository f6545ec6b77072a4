"""Find and draw the validation images with the most mistakes of a model."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import cv2
import numpy as np
import torch
from torch import Tensor

from starling.data.augment.letterbox import FILL
from starling.data.cache.store import ImageStore
from starling.data.dataset.dataset import Dataset
from starling.evaluation.validator import ScoredImage
from starling.metrics import find_mistakes

SHOWN = 9
"""The number of images in the mosaic; with more images, the boxes would be too small."""
CONFIDENCE = 0.25
"""Detections below this confidence are ignored, as in the confusion matrix."""
TILE = 640
"""The longest side of an image in the mosaic in pixels."""
KINDS = ("missed", "false")


@dataclass(frozen=True, slots=True)
class Mistakes:
    """The wrong boxes of one image, in the image's own pixels."""

    index: int
    missed: Tensor
    """[n,5] class, xyxy of the labels that no detection matches."""
    false: Tensor
    """[m,6] xyxy, confidence, class of the detections that match no label."""

    @property
    def count(self) -> int:
        """The number of wrong boxes."""
        return len(self.missed) + len(self.false)


class WorstImages:
    """Keeps the images with the most missed and false boxes; `add` is a sink for `validate`."""

    def __init__(self, limit: int = SHOWN) -> None:
        self._limit = limit
        self._heap: list[tuple[int, int, Mistakes]] = []

    def add(self, image: ScoredImage) -> None:
        """Add one image."""
        detections = image.detections[image.detections[:, 4] >= CONFIDENCE]
        missed, false = find_mistakes(detections, image.labels)
        self._keep(Mistakes(image.index, image.labels[missed], detections[false]))

    @classmethod
    def merged(cls, parts: Iterable[Self]) -> Self:
        """Return the worst images of several collections."""
        whole = cls()
        for part in parts:
            for mistakes in part.images:
                whole._keep(mistakes)
        return whole

    def _keep(self, mistakes: Mistakes) -> None:
        if mistakes.count:
            heapq.heappush(self._heap, (mistakes.count, -mistakes.index, mistakes))
            if len(self._heap) > self._limit:
                heapq.heappop(self._heap)

    @property
    def images(self) -> list[Mistakes]:
        """The kept images, the worst first; equal ones in order of the dataset."""
        return [mistakes for _, _, mistakes in sorted(self._heap, key=lambda item: item[:2], reverse=True)]


def draw_worst(worst: WorstImages, data: Dataset, store: ImageStore, path: Path) -> None:
    """Draw a mosaic of the worst images with only their wrong boxes; draws nothing without mistakes."""
    from starling.plots.batches import plot_batch

    found = worst.images
    if not found:
        return
    tiles = [_fitted(store[mistakes.index]) for mistakes in found]
    height, width = (max(tile.shape[axis] for tile in tiles) for axis in (0, 1))
    images = np.full((len(found), height, width, 3), FILL, np.uint8)
    boxes, kinds, texts = [], [], []
    names = data.distinct_names
    for image, tile, mistakes in zip(images, tiles, found, strict=True):
        image[: tile.shape[0], : tile.shape[1]] = tile
        scale = tile.shape[1] / int(data.shapes_hw[mistakes.index, 1])
        boxes.append(torch.cat((mistakes.missed[:, 1:], mistakes.false[:, :4])).numpy() * scale)
        kinds.append(np.repeat([0, 1], [len(mistakes.missed), len(mistakes.false)]))
        missed = [names[int(kind)] for kind in mistakes.missed[:, 0]]
        false = [f"{names[int(row[5])]} {float(row[4]):.2f}" for row in mistakes.false]
        texts.append(missed + false)
    titles = [f"{data.images[m.index].name}: {len(m.missed)} missed, {len(m.false)} false" for m in found]
    plot_batch(images, boxes, kinds, None, KINDS, titles, path, texts=texts)


def _fitted(image: np.ndarray) -> np.ndarray:
    """Return the image scaled to a longest side of TILE."""
    height, width = image.shape[:2]
    scale = TILE / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
