"""Batches for training and validation: choose the images, place them, and attach their labels.

Threads prepare the batches. Threads suffice because decoding, warping and colour conversion run in OpenCV, which
releases the interpreter's lock. So there are no worker processes, nothing goes through /dev/shm, and all threads
share one copy of the decoded images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from starling.config.hyp import Hyp
from starling.core.errors import ConfigError
from starling.data.augment.letterbox import Letterbox, Size, apply_letterbox, letterbox_geometry
from starling.data.augment.paint import paint_item, paint_quad
from starling.data.augment.plan import QuadPlan, plan_item, plan_letterbox
from starling.data.cache.store import ImageStore, stored_ratio
from starling.data.dataset.dataset import Dataset
from starling.data.loader.batching import Batching, BatchPlan, Slot, plan_epoch, rectangle
from starling.data.loader.prepare import Painter, Planned, Prepared, Work, part, prepared

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """Images and their labels."""

    images: Tensor
    """[B,3,H,W] RGB, channels last in memory: uint8 on the CPU, or 0 to 1 on the device with a painter."""
    targets: Tensor
    """[n,6] float32: index of the image in the batch, class, x and y of the centre, width, height, 0 to 1."""
    indices: tuple[int, ...]
    """Index in the dataset of each training image; with quad, the index of the first of four images."""
    geometry: tuple[Letterbox, ...] | None
    """The letterbox of each image, relative to the original; None for augmented images."""
    original_hw: tuple[Size, ...]
    whole: int
    """Number of images of the batch in all processes that share it."""
    padding: bool = False
    """Whether the batch has no image for this process: its one image, without labels, keeps the process in step."""
    scaled_hw: Size | None = None
    """Size that the images are resized to on the device for multi-scale; targets do not change."""
    loss_scale: float = 1.0
    """Factor of the loss: number of dataset images per training image, for quad."""

    def pixels(self) -> Array:
        """Return the images [B,3,H,W] as uint8 on the CPU, for drawing."""
        images = self.images
        if images.is_floating_point():
            images = (images.float() * 255).round().to(torch.uint8)
        return images.cpu().numpy()

    @property
    def share(self) -> float:
        """The share of this process in the whole batch, 0 to 1."""
        return 0.0 if self.padding else len(self.indices) / self.whole


class TrainLoader:
    """Augmented batches; each epoch visits every image once, in another order.

    Order and augmentation are functions of (seed, epoch, index) only: neither the number of workers nor an
    interruption changes a byte. With image weights, images are drawn at random, depending on `class_maps` too.
    """

    class_maps: list[float] | None
    """The mAP of each class in the last validation; the trainer sets it between epochs and saves it for a resume."""

    def __init__(
        self,
        dataset: Dataset,
        store: ImageStore,
        *,
        hyp: Hyp,
        image_size: int,
        batch_size: int,
        seed: int,
        workers: int,
        pin_memory: bool = False,
        batching: Batching | None = None,
        rank: int = 0,
        world_size: int = 1,
        painter: Painter | None = None,
        mosaics_end: int | None = None,
    ) -> None:
        """Prepare a loader; threads start with each epoch and end with the epoch.

        `workers` is the number of threads; with 0, each batch is prepared when it is requested. `pin_memory` puts
        batches into page-locked memory, for asynchronous copies to a GPU. Of every batch of `batch_size`,
        `rank` of `world_size` processes gets its part. A `painter` paints the images on its device. From epoch
        `mosaics_end` on, no mosaics are shown.
        """
        _check(batch_size, workers, image_size, store)
        self.batching = batching or Batching()
        self.batching.check(batch_size)
        self.class_maps = None
        self.dataset, self.store = dataset, store
        self._single = replace(hyp, mosaic=0.0)
        """The hyperparameters without mosaics."""
        self.hyp = self._single if self.batching.rect else hyp
        self._mosaics_end = math.inf if mosaics_end is None else mosaics_end
        self.image_size, self.batch_size, self.seed = image_size, batch_size, seed
        self.workers, self.pin_memory = workers, pin_memory
        self.rank, self.world_size, self.painter = rank, world_size, painter

    def __len__(self) -> int:
        """Return the number of iterations of an epoch; the last batch may be smaller."""
        return math.ceil(len(self.dataset) / self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Return the batches of `epoch` from iteration `start` on; a resumed run starts within an epoch.

        Threads begin at once. The iterator raises a worker's error; closing or dropping the iterator ends its threads.
        """
        planned = plan_epoch(
            self.batching,
            self.dataset,
            self.class_maps,
            image_size=self.image_size,
            batch_size=self.batch_size,
            seed=self.seed,
            epoch=epoch,
        )[start:]
        works = [self._work(plan, epoch) for plan in planned]
        batches = prepared(works, self.workers, pin_memory=self.pin_memory, painter=self.painter)
        return self._batches(batches, planned)

    def _batches(self, batches: Iterator[Prepared], planned: Sequence[BatchPlan]) -> Iterator[Batch]:
        shapes = self.dataset.shapes_hw
        for (work, images, targets), plan in zip(batches, planned, strict=True):
            yield Batch(
                images=images,
                targets=targets,
                indices=work.indices,
                geometry=None,
                original_hw=tuple((int(shapes[i, 0]), int(shapes[i, 1])) for i in work.indices),
                whole=work.whole,
                padding=work.padding,
                scaled_hw=plan.scaled_hw,
                loss_scale=sum(len(slot.visits) for slot in plan.slots) / len(plan.slots),
            )

    def _work(self, plan: BatchPlan, epoch: int) -> Work:
        slots, padding = part(plan.slots, self.rank, self.world_size)
        return Work(
            indices=tuple(slot.visits[0].image for slot in slots),
            hw=plan.hw,
            fill=partial(self._fill, slots, plan, epoch),
            whole=len(plan.slots),
            padding=padding,
        )

    def _fill(
        self, slots: tuple[Slot, ...], plan: BatchPlan, epoch: int, position: int, out: Array | None
    ) -> Planned:
        """Plan one training image (one dataset image, one enlarged, or four together); paint it into `out` if given."""
        slot = slots[position]
        hyp = self.hyp if epoch < self._mosaics_end else self._single
        items = tuple(
            plan_item(
                self.dataset,
                self.store.shapes_hw,
                hyp,
                plan.source_hw,
                seed=self.seed,
                epoch=epoch,
                index=visit.image,
                repeat=visit.repeat,
            )
            for visit in (slot.visits[:1] if slot.enlarged else slot.visits)
        )
        if plan.hw == plan.source_hw:
            if out is not None:
                paint_item(items[0], self.store, out)
            return items[0]
        quad = QuadPlan(items=items, enlarged=slot.enlarged)
        if out is not None:
            paint_quad(quad, self.store, out)
        return quad


class ValLoader:
    """Letterboxed batches for validation, every image once.

    With `rect`, images are sorted by aspect and each batch has the smallest shape, in multiples of the
    stride, that fits its images plus `pad` strides; without `rect`, batches are squares in the dataset's order.
    """

    def __init__(
        self,
        dataset: Dataset,
        store: ImageStore,
        *,
        image_size: int,
        batch_size: int,
        stride: int,
        rect: bool = True,
        pad: float = 0.5,
        workers: int,
        pin_memory: bool = False,
        rank: int = 0,
        world_size: int = 1,
        painter: Painter | None = None,
    ) -> None:
        """Plan the batches; `pad` is in strides. Threads start and end with each pass over the batches.

        Of every batch, `rank` of `world_size` processes gets its part, in the shape of the whole batch. A `painter`
        paints the images on its device.
        """
        _check(batch_size, workers, image_size, store)
        if stride < 1:
            raise ConfigError("stride", stride, "must be at least 1")
        self.dataset, self.store = dataset, store
        self.image_size, self.batch_size, self.stride = image_size, batch_size, stride
        self.workers, self.pin_memory = workers, pin_memory
        self.rank, self.world_size, self.painter = rank, world_size, painter
        shapes = dataset.shapes_hw
        aspect = shapes[:, 0] / shapes[:, 1]
        order = np.argsort(aspect, kind="stable") if rect else np.arange(len(dataset))
        self.batches: list[tuple[tuple[int, ...], Size]] = []
        for first in range(0, len(dataset), batch_size):
            indices = order[first : first + batch_size]
            side = math.ceil(image_size / stride) * stride
            hw = rectangle(aspect[indices], image_size, stride, pad) if rect else (side, side)
            self.batches.append((tuple(indices.tolist()), hw))

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches, in the same order each time."""
        shapes = self.dataset.shapes_hw
        works = [self._work(indices, hw) for indices, hw in self.batches]
        batches = prepared(works, self.workers, pin_memory=self.pin_memory, painter=self.painter)
        for work, images, targets in batches:
            yield Batch(
                images=images,
                targets=targets,
                indices=work.indices,
                geometry=tuple(self._geometry(i, work.hw) for i in work.indices),
                original_hw=tuple((int(shapes[i, 0]), int(shapes[i, 1])) for i in work.indices),
                whole=work.whole,
                padding=work.padding,
            )

    def _work(self, whole: tuple[int, ...], hw: Size) -> Work:
        indices, padding = part(whole, self.rank, self.world_size)
        fill = partial(self._fill, indices, hw)
        return Work(indices=indices, hw=hw, fill=fill, whole=len(whole), padding=padding)

    def _letterbox(self, index: int, hw: Size) -> Letterbox:
        height, width = self.store.shapes_hw[index].tolist()
        return letterbox_geometry((height, width), hw, minimal=False, upscale=False)

    def _geometry(self, index: int, hw: Size) -> Letterbox:
        """Return the letterbox relative to the original image, with both resizings as one ratio."""
        height, width = self.dataset.shapes_hw[index].tolist()
        geometry = self._letterbox(index, hw)
        return replace(geometry, ratio=geometry.ratio * stored_ratio((height, width), self.image_size))

    def _fill(self, indices: tuple[int, ...], hw: Size, position: int, out: Array | None) -> Planned:
        index = indices[position]
        geometry = self._letterbox(index, hw)
        if out is not None:
            apply_letterbox(self.store[index], geometry, out)
        height, width = self.store.shapes_hw[index].tolist()
        return plan_letterbox(index, (height, width), geometry, self.dataset.labels[index])


def _check(batch_size: int, workers: int, image_size: int, store: ImageStore) -> None:
    if batch_size < 1:
        raise ConfigError("batch_size", batch_size, "must be at least 1")
    if workers < 0:
        raise ConfigError("workers", workers, "must be 0 or more")
    if store.image_size != image_size:
        raise ConfigError("image_size", image_size, f"but the store holds images of {store.image_size}")
