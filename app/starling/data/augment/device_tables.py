"""The plans of a batch as three padded tables and the masks, in one buffer that is copied to the device in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from starling.data.augment.paint import outline_mask
from starling.data.augment.plan import ItemPlan, Sample

Array = np.ndarray[Any, Any]

INTS = 11
"""Columns of the integers of a sample: its frame in output pixels (left, top, right, bottom), first byte of its part in
the pixels, bytes per image row, last column and row of the part, first byte of its mask if the mask began at the
output's corner, bytes per mask row (0 for no mask), and whether edges clip the sample."""
FLOATS = 21
"""Columns of the real numbers of a sample: the nine of the matrix from output pixel to part pixel, row by row, then
(a, b, c) of four edges; an output pixel (x, y) is inside where a·x + b·y + c >= 0 for all of them."""
COLOURS = 5
"""Columns of an item: whether colours change, the gains of hue, saturation and value, the weight of the first layer."""

_ALIGNMENT = 64
"""Alignment in bytes; Triton would compile a kernel again for pointers with another alignment."""
_HALF = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
_HALF_BACK = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tables:
    """The samples of a batch as tables on the device; the frames also on the CPU."""

    ints: Tensor
    """[B,L,S,INTS] int64; unused sample slots of an item have an empty frame."""
    floats: Tensor
    """[B,L,S,FLOATS] float32."""
    colours: Tensor
    """[B,COLOURS] float32."""
    masks: Tensor
    """[m] uint8, the masks of pasted objects one after another; at least one byte."""
    frames: Array
    """[B,L,S,4] on the CPU: pixels outside of all frames are skipped."""
    edged: Array
    """[S] whether the sample with that number has edges in any item and layer."""
    masked: Array
    """[S] whether the sample with that number has a mask in any item and layer."""
    turned: Array
    """[S] whether the matrix of that sample may do more than scale, mirror and move in any item and layer."""
    coloured: bool
    """Whether any item changes its colours."""


def load_tables(plans: Sequence[ItemPlan], offsets: Array, shapes_hw: Array, device: torch.device) -> Tables:
    """Return the tables of a batch on `device`, without waiting for the copy.

    Image i begins at byte `offsets[i]` of the pixels and has `shapes_hw[i]` pixels of three bytes each.
    """
    layers = max(len(plan.layers) for plan in plans)
    slots = max(1, *(len(layer) for plan in plans for layer in plan.layers))
    shape = (len(plans), layers, slots)
    places = [
        (item, number, slot)
        for item, plan in enumerate(plans)
        for number, layer in enumerate(plan.layers)
        for slot in range(len(layer))
    ]
    samples = [sample for plan in plans for layer in plan.layers for sample in layer]
    masks: list[Array] = []
    ints, floats = np.zeros((*shape, INTS), np.int64), np.zeros((*shape, FLOATS), np.float32)
    if samples:
        where = tuple(np.array(places).T)
        ints[where] = _whole_numbers(samples, offsets, shapes_hw, masks)
        floats[where] = _real_numbers(samples)
    colours = np.array([_colours(plan) for plan in plans], np.float32)
    parts = (ints, floats, colours, np.concatenate(masks) if masks else np.zeros(1, np.uint8))
    on_device = _copied(parts, device)
    edged, masked = (np.asarray(ints[..., column].any((0, 1))) for column in (10, 9))
    return Tables(
        ints=on_device[0],
        floats=on_device[1],
        colours=on_device[2],
        masks=on_device[3],
        frames=ints[..., :4],
        edged=edged,
        masked=masked,
        turned=edged | masked,
        coloured=bool(colours[:, 0].any()),
    )


def _copied(parts: Sequence[Array], device: torch.device) -> list[Tensor]:
    """Return the arrays as tensors on the device, copied in one transfer."""
    starts, end = [], 0
    for part in parts:
        starts.append(end)
        end += -(-part.nbytes // _ALIGNMENT) * _ALIGNMENT
    staging = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = staging.numpy()
    for part, start in zip(parts, starts, strict=True):
        there[start : start + part.nbytes] = part.reshape(-1).view(np.uint8)
    moved = staging.to(device, non_blocking=True)
    return [
        moved[start : start + part.nbytes].view(torch.from_numpy(part[:0]).dtype).view(part.shape)
        for part, start in zip(parts, starts, strict=True)
    ]


def _whole_numbers(samples: Sequence[Sample], offsets: Array, shapes_hw: Array, masks: list[Array]) -> Array:
    """Return [n,INTS], and append the masks of the samples to `masks`."""
    images = np.array([sample.image for sample in samples])
    part = np.array([sample.part for sample in samples])
    rows = np.zeros((len(samples), INTS), np.int64)
    rows[:, :4] = [sample.frame for sample in samples]
    rows[:, 5] = shapes_hw[images, 1] * 3
    rows[:, 4] = offsets[images] + part[:, 1] * rows[:, 5] + part[:, 0] * 3
    rows[:, 6:8] = part[:, 2:] - part[:, :2] - 1
    used = 0
    for row, sample in zip(rows, samples, strict=True):
        if sample.outline is None:
            continue
        if not sample.pasted:
            row[10] = 1
            continue
        mask = outline_mask(sample.outline, sample.frame, pasted=True)
        masks.append(mask.reshape(-1))
        row[9] = mask.shape[1]
        row[8] = used - sample.frame.top * mask.shape[1] - sample.frame.left
        used += mask.size
    return rows


def _real_numbers(samples: Sequence[Sample]) -> Array:
    """Return [n,FLOATS]."""
    matrices = np.stack([sample.matrix for sample in samples])
    rows = np.zeros((len(samples), FLOATS))
    rows[:, :9] = (_HALF_BACK @ np.linalg.inv(matrices) @ _HALF).reshape(-1, 9)
    for row, sample in zip(rows, samples, strict=True):
        if sample.outline is not None and not sample.pasted:
            row[9:] = _edges(sample.outline).reshape(-1)
    return rows


def _edges(corners: Array) -> Array:
    """Return (a, b, c) of the four edges [4,3] of a quadrangle [4,2], in units of a pixel.

    OpenCV's filling also draws the outline. To include the pixels nearest to an edge as OpenCV does, the edge is moved
    outward by half a pixel along the axis that is nearer to its normal.
    """
    points = np.rint((corners - 0.5) * 16) / 16
    along = np.roll(points, -1, 0) - points
    turn = points[:, 0] @ np.roll(points[:, 1], -1) - points[:, 1] @ np.roll(points[:, 0], -1)
    inward = np.stack((-along[:, 1], along[:, 0]), 1) * (1 if turn >= 0 else -1)
    inward /= np.maximum(np.abs(inward).max(1, keepdims=True), 1e-9)
    return np.concatenate((inward, 0.5 - (inward * points).sum(1, keepdims=True)), 1)


def _colours(plan: ItemPlan) -> tuple[float, ...]:
    gains = (1.0, 1.0, 1.0) if plan.gains is None else tuple(plan.gains.tolist())
    return (float(plan.gains is not None), *gains, plan.share)
