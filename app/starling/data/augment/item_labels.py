"""Labels of a training item: from each image to the canvas, and through a matrix to the output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from starling.data.augment.letterbox import Size
from starling.data.augment.outlines import cut, through
from starling.data.dataset.labels import Polygon

Array = np.ndarray[Any, Any]

MIN_BOX_SIDE = 2.0
"""A label is dropped if a side of its box is this short in output pixels, or shorter,"""
MIN_AREA_LEFT = 0.1
"""... or if this fraction of its area, or less, stays in view,"""
MIN_OUTLINED_AREA_LEFT = 0.01
"""... or this fraction, if a polygon shows how much of the object itself stays in view,"""
MAX_ASPECT = 100.0
"""... or if one side is this many times the other, or more."""


def labels_on_canvas(rows: Sequence[Array], tiles_xywh: Sequence[tuple[int, ...]], canvas_hw: Size) -> Array:
    """Return the labels of tiles, each [n,5] class, xywhn, as one [m,5] float32 class, xyxy in canvas pixels.

    A tile is its corner's x and y, width and height. Boxes are clipped to the canvas.
    """
    labels = np.concatenate(rows)
    tiles = np.array(tiles_xywh, np.float64).repeat([len(some) for some in rows], 0)
    corners, sizes = tiles[:, :2], tiles[:, 2:]
    boxes = np.empty_like(labels)
    boxes[:, 0] = labels[:, 0]
    half = labels[:, 3:5] / 2
    boxes[:, 1:3] = (labels[:, 1:3] - half) * sizes + corners
    boxes[:, 3:5] = (labels[:, 1:3] + half) * sizes + corners
    xyxy = boxes[:, 1:]
    np.maximum(xyxy, 0, out=xyxy)
    np.minimum(xyxy, np.array((*canvas_hw[::-1], *canvas_hw[::-1]), np.float32), out=xyxy)
    return boxes


def labels_in_view(
    boxes: Array,
    matrix: Array,
    aligned: bool,
    scale: float,
    out_hw: Size,
    outlines: Sequence[Polygon | None] = (),
) -> Array:
    """Return labels [n,5] class, xywhn of canvas boxes seen through `matrix`, without boxes that are hardly in view.

    `outlines`, empty or one per box, give tighter boxes than the corners of a rotated box do.
    """
    xyxy = boxes[:, 1:5]
    if aligned:
        (a, _, c), (_, e, f), _ = matrix.tolist()
        moved = xyxy * np.array((a, e, a, e), np.float32) + np.array((c, f, c, f), np.float32)
        low, high = np.minimum(moved[:, :2], moved[:, 2:]), np.maximum(moved[:, :2], moved[:, 2:])
    else:
        corners = np.ones((len(boxes), 4, 3))
        corners[:, :, :2] = xyxy[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
        projected = corners @ matrix.T
        points = projected[:, :, :2] / np.maximum(projected[:, :, 2:], 1e-6)
        low, high = points.min(1), points.max(1)
    out_wh = np.array(out_hw[::-1], np.float32)
    low, high = (np.minimum(np.maximum(corner, 0), out_wh) for corner in (low, high))
    least = np.full(len(boxes), MIN_AREA_LEFT)
    for row, outline in enumerate(outlines):
        if outline is not None:
            least[row] = MIN_OUTLINED_AREA_LEFT
            seen = cut(through(outline, matrix), out_hw)
            low[row], high[row] = (seen.min(0), seen.max(0)) if len(seen) else (0, 0)
    size = high - low
    width, height = size[:, 0], size[:, 1]
    area_before = (xyxy[:, 2] - xyxy[:, 0]) * (xyxy[:, 3] - xyxy[:, 1]) * (scale * scale)
    keep = (size > MIN_BOX_SIDE).all(1) & (width * height > least * area_before)
    keep &= (width < MAX_ASPECT * height) & (height < MAX_ASPECT * width)
    labels = np.empty((len(boxes), 5), np.float32)
    labels[:, 0] = boxes[:, 0]
    labels[:, 1:3] = (low + high) / (2 * out_wh)
    labels[:, 3:5] = size / out_wh
    return labels if keep.all() else labels[keep]
