"""Batches for training and validation, prepared in threads.

Threads suffice because decoding, warping and colour conversion run in OpenCV, which releases the
interpreter's lock; so there are no worker processes, nothing goes through /dev/shm, and one copy of the
decoded pictures serves all of them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor

from app.config.hyp import Hyp
from app.data.augment import training_item
from app.data.batching import Batching, BatchPlan, Slot, plan_epoch, rectangle
from app.data.dataset import Dataset
from app.data.letterbox import FILL, Letterbox, Size, apply_letterbox, letterbox_geometry
from app.data.store import ImageStore, stored_ratio
from app.errors import ConfigError

PREFETCH = 3
"""Batches being prepared or waiting, beside the one in use."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """Pictures and their labels."""

    images: Tensor
    """[B,3,H,W] uint8 RGB, channels last in memory."""
    targets: Tensor
    """[n,6] float32: position of the picture in the batch, class, x and y of the centre, width, height, 0 to 1."""
    indices: tuple[int, ...]
    """Positions of the pictures in the dataset, one an image: the first, where quad joins four."""
    geometry: tuple[Letterbox, ...] | None
    """How each picture lies in its letterbox, from the original; None where augmentation moved it."""
    original_hw: tuple[Size, ...]
    whole: int
    """Images of the batch over all processes that share it."""
    padding: bool = False
    """Whether the batch has no image for this process: the one here, without labels, only keeps it in step."""
    scaled_hw: Size | None = None
    """What the images are to be resized to on the device, as multi-scale asks; targets stay as they are."""
    loss_scale: float = 1.0
    """What the loss is to be multiplied by: pictures an image, as quad joins them."""

    @property
    def share(self) -> float:
        """This process's part of the whole batch, 0 to 1."""
        return 0.0 if self.padding else len(self.indices) / self.whole


Item = TypeVar("Item")
_Work = Callable[[int, np.ndarray[Any, Any]], np.ndarray[Any, Any]]
"""Fills one image [H,W,3] of a batch, given its position in it, and returns its labels [n,5]."""


class TrainLoader:
    """Augmented batches; each epoch visits every picture once, in an order of its own.

    Order and augmentation are functions of (seed, epoch, index) alone: neither the number of workers nor an
    interruption changes a byte. With image weights pictures are drawn instead, by `class_maps` too.
    """

    class_maps: list[float] | None
    """The last validation's mAP of each class; its owner sets it between epochs and keeps it for a resume."""

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
    ) -> None:
        """Prepare a loader; threads start with each epoch and end with it.

        `workers` is the number of threads; 0 prepares each batch when it is asked for. `pin_memory` puts
        batches into page-locked memory, for copies to a GPU that do not wait. Of every batch of `batch_size`,
        `rank` of `world_size` processes gets its part.
        """
        _check(batch_size, workers, image_size, store)
        self.batching = batching or Batching()
        self.batching.check(batch_size)
        self.class_maps = None
        self.dataset, self.store = dataset, store
        self.hyp = replace(hyp, mosaic=0.0) if self.batching.rect else hyp
        self.image_size, self.batch_size, self.seed = image_size, batch_size, seed
        self.workers, self.pin_memory = workers, pin_memory
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        """Return the iterations of an epoch; the last batch may be smaller."""
        return math.ceil(len(self.dataset) / self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of `epoch` from iteration `start` on, as a resumed run needs.

        A worker's error is raised here. Closing the iterator, or dropping it, ends its threads.
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
        plans = [self._plan(plan, epoch) for plan in planned]
        shapes = self.dataset.shapes_hw
        prepared = _prepared(plans, self.workers, self.pin_memory)
        for (plan, images, targets), of in zip(prepared, planned, strict=True):
            yield Batch(
                images=images,
                targets=targets,
                indices=plan.indices,
                geometry=None,
                original_hw=tuple((int(shapes[i, 0]), int(shapes[i, 1])) for i in plan.indices),
                whole=plan.whole,
                padding=plan.padding,
                scaled_hw=of.scaled_hw,
                loss_scale=sum(len(slot.visits) for slot in of.slots) / len(of.slots),
            )

    def _plan(self, plan: BatchPlan, epoch: int) -> _Plan:
        slots, padding = _part(plan.slots, self.rank, self.world_size)
        return _Plan(
            indices=tuple(slot.visits[0].picture for slot in slots),
            hw=plan.hw,
            fill=partial(self._fill, slots, plan.picture_hw, epoch),
            whole=len(plan.slots),
            padding=padding,
        )

    def _fill(
        self, slots: tuple[Slot, ...], hw: Size, epoch: int, position: int, out: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any]:
        """Fill one image and return its labels [n,5]: a picture of `hw`, one enlarged, or four side by side."""
        slot, (height, width) = slots[position], hw

        def item(number: int, place: np.ndarray[Any, Any] | None) -> tuple[np.ndarray[Any, Any], ...]:
            index, repeat = slot.visits[number]
            return training_item(
                self.dataset,
                self.store,
                self.hyp,
                hw,
                seed=self.seed,
                epoch=epoch,
                index=index,
                repeat=repeat,
                out=place,
            )

        if out.shape[:2] == hw:
            return item(0, out)[1]
        if slot.enlarged:
            image, labels = item(0, None)
            cv2.resize(image, (2 * width, 2 * height), dst=out, interpolation=cv2.INTER_LINEAR)
            return labels
        out[:] = FILL  # where an epoch ends in less than four
        found = []
        for number in range(len(slot.visits)):
            row, column = divmod(number, 2)
            place = out[row * height : (row + 1) * height, column * width : (column + 1) * width]
            labels = item(number, place)[1]
            labels[:, 1:5] /= 2
            labels[:, 1:3] += (column / 2, row / 2)
            found.append(labels)
        return np.concatenate(found)


class ValLoader:
    """Letterboxed batches for validation, every picture once.

    With `rect`, pictures are sorted by aspect and each batch has the smallest shape, in multiples of the
    stride, that fits its pictures plus `pad` strides; without, batches are squares in the dataset's order.
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
    ) -> None:
        """Plan the batches; `pad` is in strides. Threads start with each iteration and end with it.

        Of every batch, `rank` of `world_size` processes gets its part, in the shape of the whole.
        """
        _check(batch_size, workers, image_size, store)
        if stride < 1:
            raise ConfigError("stride", stride, "must be at least 1")
        self.dataset, self.store = dataset, store
        self.image_size, self.batch_size, self.stride = image_size, batch_size, stride
        self.workers, self.pin_memory = workers, pin_memory
        self.rank, self.world_size = rank, world_size
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
        plans = [self._plan(indices, hw) for indices, hw in self.batches]
        for plan, images, targets in _prepared(plans, self.workers, self.pin_memory):
            yield Batch(
                images=images,
                targets=targets,
                indices=plan.indices,
                geometry=tuple(self._geometry(i, plan.hw) for i in plan.indices),
                original_hw=tuple((int(shapes[i, 0]), int(shapes[i, 1])) for i in plan.indices),
                whole=plan.whole,
                padding=plan.padding,
            )

    def _plan(self, whole: tuple[int, ...], hw: Size) -> _Plan:
        indices, padding = _part(whole, self.rank, self.world_size)
        fill = partial(self._fill, indices)
        return _Plan(indices=indices, hw=hw, fill=fill, whole=len(whole), padding=padding)

    def _letterbox(self, index: int, hw: Size) -> Letterbox:
        height, width = self.store.shapes_hw[index].tolist()
        return letterbox_geometry((height, width), hw, minimal=False, upscale=False)

    def _geometry(self, index: int, hw: Size) -> Letterbox:
        """Return the letterbox as seen from the original picture, with both resizings as one ratio."""
        height, width = self.dataset.shapes_hw[index].tolist()
        geometry = self._letterbox(index, hw)
        return replace(geometry, ratio=geometry.ratio * stored_ratio((height, width), self.image_size))

    def _fill(
        self, indices: tuple[int, ...], position: int, out: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any]:
        index, (height, width) = indices[position], out.shape[:2]
        geometry = self._letterbox(index, (height, width))
        apply_letterbox(self.store[index], geometry, out)
        labels = self.dataset.labels[index].copy()
        out_wh = np.array((width, height), np.float32)
        resized_wh = np.array(geometry.resized_hw[::-1], np.float32)
        labels[:, 1:3] = (labels[:, 1:3] * resized_wh + geometry.pad_wh) / out_wh
        labels[:, 3:5] *= resized_wh / out_wh
        return labels


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What one batch is to hold."""

    indices: tuple[int, ...]
    hw: Size
    fill: _Work
    whole: int
    """Images of the batch over all processes."""
    padding: bool
    """Whether there is none for this process."""


def _part(items: Sequence[Item], rank: int, world_size: int) -> tuple[tuple[Item, ...], bool]:
    """Return every `world_size`th item of a batch from the `rank`th on; parts differ by one at most.

    Where that is none, return the batch's first, to keep in step with, and True.
    """
    own = tuple(items[rank::world_size])
    return own or tuple(items[:1]), not own


def _prepared(
    plans: Sequence[_Plan], workers: int, pin_memory: bool
) -> Iterator[tuple[_Plan, Tensor, Tensor]]:
    """Yield (plan, images, targets) in order, prepared at most PREFETCH batches ahead."""
    cv2.setNumThreads(1)  # the parallelism is over pictures; OpenCV's own pool would fight it for the cores
    if workers == 0:
        for plan in plans:
            pixels = _allocate(plan, pin_memory)
            yield plan, *_assembled(plan, pixels, _fill_slice(plan, pixels.numpy(), 0, len(plan.indices)))
        return
    pool = ThreadPoolExecutor(workers, "loader")
    waiting: deque[tuple[_Plan, Tensor, list[Future[list[np.ndarray[Any, Any]]]]]] = deque()
    try:
        for plan in plans:
            waiting.append(_submit(pool, plan, workers, pin_memory))
            if len(waiting) > PREFETCH:
                yield _finish(*waiting.popleft())
        while waiting:
            yield _finish(*waiting.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(
    pool: ThreadPoolExecutor, plan: _Plan, workers: int, pin_memory: bool
) -> tuple[_Plan, Tensor, list[Future[list[np.ndarray[Any, Any]]]]]:
    """Share one batch among all workers, so that the batch needed next is also the one ready next."""
    pixels = _allocate(plan, pin_memory)
    count = len(plan.indices)
    share = math.ceil(count / workers)
    parts = [
        pool.submit(_fill_slice, plan, pixels.numpy(), first, min(first + share, count))
        for first in range(0, count, share)
    ]
    return plan, pixels, parts


def _finish(
    plan: _Plan, pixels: Tensor, parts: list[Future[list[np.ndarray[Any, Any]]]]
) -> tuple[_Plan, Tensor, Tensor]:
    return plan, *_assembled(plan, pixels, [labels for part in parts for labels in part.result()])


def _allocate(plan: _Plan, pin_memory: bool) -> Tensor:
    return torch.empty((len(plan.indices), *plan.hw, 3), dtype=torch.uint8, pin_memory=pin_memory)


def _fill_slice(
    plan: _Plan, pixels: np.ndarray[Any, Any], first: int, end: int
) -> list[np.ndarray[Any, Any]]:
    return [plan.fill(position, pixels[position]) for position in range(first, end)]


def _assembled(plan: _Plan, pixels: Tensor, labels: list[np.ndarray[Any, Any]]) -> tuple[Tensor, Tensor]:
    """Return images as [B,3,H,W] without copying, and the labels as one table, empty for padding."""
    if plan.padding:
        labels = [rows[:0] for rows in labels]
    targets = np.empty((sum(map(len, labels)), 6), np.float32)
    targets[:, 0] = np.repeat(np.arange(len(labels), dtype=np.float32), [len(rows) for rows in labels])
    if len(targets):
        targets[:, 1:] = np.concatenate(labels)
    return pixels.permute(0, 3, 1, 2), torch.from_numpy(targets)


def _check(batch_size: int, workers: int, image_size: int, store: ImageStore) -> None:
    if batch_size < 1:
        raise ConfigError("batch_size", batch_size, "must be at least 1")
    if workers < 0:
        raise ConfigError("workers", workers, "must be 0 or more")
    if store.image_size != image_size:
        raise ConfigError("image_size", image_size, f"but the store holds pictures of {store.image_size}")
