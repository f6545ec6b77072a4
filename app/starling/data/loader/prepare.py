"""Prepare batches in threads, a bounded number ahead: threads paint them, or plan them for painting on the device."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor

from starling.data.augment.letterbox import Size
from starling.data.augment.plan import ItemPlan, QuadPlan

Array = np.ndarray[Any, Any]
Item = TypeVar("Item")
Planned = ItemPlan | QuadPlan
Fill = Callable[[int, Array | None], Planned]
"""Takes the position of an image in the batch and the pixels [H,W,3] to paint, or None; returns the image's plan."""

PREFETCH = 3
"""Number of batches that are prepared or waiting, in addition to the one in use."""


TARGET_ROWS = 256
"""Number of targets on a GPU is a multiple of this number."""


class Painter(Protocol):
    """Paints plans on the training device, as `starling.data.augment.device_paint.DevicePainter` does."""

    def paint(self, plans: Sequence[ItemPlan]) -> Tensor:
        """Return the images [B,3,H,W], channels last in memory."""

    def paint_quads(self, plans: Sequence[QuadPlan]) -> Tensor:
        """Return the images [B,3,2H,2W], channels last in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One batch to prepare."""

    indices: tuple[int, ...]
    """Index in the dataset of each training image."""
    hw: Size
    fill: Fill
    whole: int
    """Number of images of the batch in all processes."""
    padding: bool
    """Whether the batch has no image for this process."""


Prepared = tuple[Work, Tensor, Tensor]


def part(items: Sequence[Item], rank: int, world_size: int) -> tuple[tuple[Item, ...], bool]:
    """Return every `world_size`th item of a batch from the `rank`th on; part sizes differ by one at most.

    If there is no such item, return the batch's first item, which keeps the process in step, and True.
    """
    own = tuple(items[rank::world_size])
    return own or tuple(items[:1]), not own


def prepared(
    works: Sequence[Work], workers: int, *, pin_memory: bool = False, painter: Painter | None = None
) -> Iterator[Prepared]:
    """Return an iterator of (work, images [B,3,H,W] channels last, targets [n,6]), in order.

    At most PREFETCH batches are prepared ahead. `workers` threads share each batch, starting at once; with 0, a batch
    is prepared when requested. Images are uint8 in memory (`pin_memory`: page-locked), or the output of a `painter` on
    its device. The iterator raises a thread's error; closing or dropping the iterator ends the threads.
    """
    cv2.setNumThreads(1)  # the loader's threads use all cores; OpenCV's own would compete with them
    if workers == 0:
        return _one_by_one(works, pin_memory, painter)
    batches = _threaded(works, workers, pin_memory, painter)
    next(batches)
    return batches  # type: ignore[return-value]  # the first None has been taken


def _one_by_one(works: Sequence[Work], pin_memory: bool, painter: Painter | None) -> Iterator[Prepared]:
    for work in works:
        pixels = None if painter else _allocate(work, pin_memory)
        filled = _fill_slice(work, pixels, 0, len(work.indices))
        yield work, *_assembled(work, pixels, filled, painter, pin_memory)


def _threaded(
    works: Sequence[Work], workers: int, pin_memory: bool, painter: Painter | None
) -> Iterator[Prepared | None]:
    """Yield None when the first batches are in preparation, then each finished batch."""
    pool = ThreadPoolExecutor(workers, "loader")
    waiting: deque[tuple[Work, Tensor | None, list[Future[list[Planned]]]]] = deque()

    def begin(work: Work) -> None:
        pixels = None if painter else _allocate(work, pin_memory)
        waiting.append((work, pixels, _submit(pool, work, pixels, workers)))

    def finish() -> Prepared:
        work, pixels, shares = waiting.popleft()
        filled = [item for share in shares for item in share.result()]
        return work, *_assembled(work, pixels, filled, painter, pin_memory)

    try:
        for work in works[:PREFETCH]:
            begin(work)
        yield None
        for work in works[PREFETCH:]:
            begin(work)
            yield finish()
        while waiting:
            yield finish()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(
    pool: ThreadPoolExecutor, work: Work, pixels: Tensor | None, workers: int
) -> list[Future[list[Planned]]]:
    """Divide one batch among all workers, so that the batch needed next is also finished next."""
    count = len(work.indices)
    share = math.ceil(count / workers)
    return [
        pool.submit(_fill_slice, work, pixels, first, min(first + share, count))
        for first in range(0, count, share)
    ]


def _allocate(work: Work, pin_memory: bool) -> Tensor:
    return torch.empty((len(work.indices), *work.hw, 3), dtype=torch.uint8, pin_memory=pin_memory)


def _fill_slice(work: Work, pixels: Tensor | None, first: int, end: int) -> list[Planned]:
    if pixels is None:
        return [work.fill(position, None) for position in range(first, end)]
    images = pixels.numpy()
    return [work.fill(position, images[position]) for position in range(first, end)]


def _assembled(
    work: Work, pixels: Tensor | None, filled: list[Planned], painter: Painter | None, pin_memory: bool
) -> tuple[Tensor, Tensor]:
    """Return the images, painted now if a painter paints them, and the labels as one table, empty for padding."""
    images = _painted(filled, painter) if pixels is None else pixels.permute(0, 3, 1, 2)
    labels = [item.labels[:0] if work.padding else item.labels for item in filled]
    targets = np.empty((sum(map(len, labels)), 6), np.float32)
    targets[:, 0] = np.repeat(np.arange(len(labels), dtype=np.float32), [len(rows) for rows in labels])
    if len(targets):
        targets[:, 1:] = np.concatenate(labels)
    table = torch.from_numpy(targets)
    return images, table.pin_memory() if pin_memory else table


def filled_up(targets: Tensor) -> Tensor:
    """Return targets [n,6] with padding rows, of image -1, up to a multiple of TARGET_ROWS.

    GPU memory and kernels are chosen by shape: the padding leaves a few shapes in place of one per batch.
    """
    return torch.nn.functional.pad(targets, (0, 0, 0, -len(targets) % TARGET_ROWS), value=-1.0)


def _painted(filled: list[Planned], painter: Painter | None) -> Tensor:
    assert painter is not None, "what is not painted yet is painted by it"
    quads = [item for item in filled if isinstance(item, QuadPlan)]
    if quads:
        return painter.paint_quads(quads)
    return painter.paint([item for item in filled if isinstance(item, ItemPlan)])
