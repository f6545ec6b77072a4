"""Polygons of labels: transform them, clip them, and choose the objects that copy-paste pastes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from starling.data.augment.letterbox import Size
from starling.data.dataset.labels import Polygon

Array = np.ndarray[Any, Any]

MAX_HIDDEN = 0.3
"""Fraction of the box of any other object that a pasted object must not reach in covering it."""


def through(points: Polygon, matrix: Array) -> Polygon:
    """Return points [k,2] transformed by a matrix [3,3]."""
    seen = points @ matrix[:, :2].T + matrix[:, 2]
    return seen[:, :2] / np.maximum(seen[:, 2:], 1e-6)


def cut(points: Polygon, hw: Size) -> Polygon:
    """Return the part of a polygon [k,2] in pixels that lies in a frame of size `hw`; no points if no part does.

    Sutherland and Hodgman, CACM 1974. Pieces of a concave polygon stay joined along the edge, which changes
    neither its box nor its filling.
    """
    height, width = hw
    if (points >= 0).all() and (points <= (width, height)).all():
        return points
    for axis, limit in ((0, width), (1, height)):
        points = _beyond(points, axis, 0.0, 1)
        points = _beyond(points, axis, float(limit), -1)
    return points


def _beyond(points: Polygon, axis: int, limit: float, sign: int) -> Polygon:
    """Return the part of a polygon on one side of an axis-parallel line; sign 1 is the side of larger numbers."""
    distance = (points[:, axis] - limit) * sign
    inside = distance >= 0
    if inside.all():
        return points
    following, there = np.roll(points, -1, 0), np.roll(distance, -1)
    crosses = inside != (there >= 0)
    share = distance / np.where(crosses, distance - there, 1.0)
    corners = np.stack((points, points + share[:, None] * (following - points)), 1).reshape(-1, 2)
    return corners[np.stack((inside, crosses), 1).reshape(-1)]


class Outlines:
    """The polygons of a canvas of tiles, in canvas pixels, parallel to the boxes of all tiles."""

    def __init__(self) -> None:
        self.points: list[Polygon | None] = []
        self.tiles: list[int] = []
        """For each box the number of its tile."""

    def add(
        self,
        polygons: Sequence[Polygon | None],
        boxes: Array,
        tile_wh: Size,
        corner_xy: tuple[float, float],
        canvas_hw: Size,
        tile: int,
    ) -> None:
        """Add a tile's polygons, clipped to the canvas, and fit its `boxes` [n,5] class, xyxy to the result."""
        self.tiles += [tile] * len(boxes)
        if not polygons:
            self.points += [None] * len(boxes)
            return
        for row, polygon in enumerate(polygons):
            points = None
            if polygon is not None:
                points = cut(polygon * tile_wh + corner_xy, canvas_hw)
                if len(points):
                    boxes[row, 1:3], boxes[row, 3:5] = points.min(0), points.max(0)
                else:
                    boxes[row, 3:5] = boxes[row, 1:3]
            self.points.append(points)


def choose_pastes(
    boxes_xyxy: Array,
    outlines: Sequence[Polygon | None],
    probability: float,
    width: int,
    stream: np.random.Generator,
) -> list[tuple[int, Array]]:
    """Return the indices of the objects to paste, mirrored at the middle of the canvas, with their new boxes [4].

    A share of `probability` of the objects with an outline is drawn (Ghiasi et al., CVPR 2021); an object that would
    hide MAX_HIDDEN or more of the box of another object, pasted or not, is not pasted.
    """
    able = [index for index, outline in enumerate(outlines) if outline is not None and len(outline) > 2]
    drawn = stream.permutation(len(able))[: round(probability * len(able))]
    there = boxes_xyxy
    chosen = []
    for position in drawn.tolist():
        index = able[position]
        left, top, right, bottom = boxes_xyxy[index]
        box = np.array((width - right, top, width - left, bottom), boxes_xyxy.dtype)
        if (_hidden(box, there) < MAX_HIDDEN).all():
            chosen.append((index, box))
            there = np.concatenate((there, box[None]))
    return chosen


def _hidden(box_xyxy: Array, others_xyxy: Array) -> Array:
    """Return the fraction [n] of each other box that `box` covers."""
    overlap = np.minimum(box_xyxy[2:], others_xyxy[:, 2:]) - np.maximum(box_xyxy[:2], others_xyxy[:, :2])
    area = (others_xyxy[:, 2:] - others_xyxy[:, :2]).prod(1)
    return overlap.clip(0).prod(1) / np.maximum(area, 1e-9)
