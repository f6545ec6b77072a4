"""Training items: mosaic, affine, colour and flips, each a pure function of (seed, epoch, index).

The classic recipe pastes four pictures on a canvas of twice the side, warps that canvas and cuts out the
middle. Here the canvas is never painted. For each picture the whole chain (place on the canvas, centre,
perspective, rotate and scale, shear, translate, flip) is one 3x3 matrix, and each picture is sampled once,
straight into the part of the output that it covers. Copy-paste is one more such sample, mirrored.

Matrices act on continuous coordinates, in which pixel i covers [i, i+1), as box edges do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np

from app.config.hyp import Hyp
from app.data.dataset import Dataset
from app.data.labels import Polygon
from app.data.letterbox import FILL, Size
from app.data.outlines import Outlines, choose_pastes, cut, through
from app.data.streams import picture_stream

Array = np.ndarray[Any, Any]

MIN_BOX_SIDE = 2.0
"""A label is dropped when a side of it is this short in output pixels, or shorter."""
MIN_AREA_LEFT = 0.1
"""... or when this part of its area, or less, is left in view."""
MIN_OUTLINED_AREA_LEFT = 0.01
"""The same where a polygon tells what is left of the object itself."""
MAX_ASPECT = 100.0
"""... or when it became this thin."""

# Where each uniform number of a view is in its row of draws.
_U_MOSAIC, _U_MIXUP, _U_FIRST, _U_PARTNER, _U_CENTRE = 0, 1, 2, 3, 6
_U_PERSPECTIVE, _U_ROTATE, _U_SCALE, _U_SHEAR, _U_TRANSLATE = 8, 10, 11, 12, 14
_U_FLIPUD, _U_FLIPLR, _U_HSV, _U_CORNER, _DRAWS = 16, 17, 18, 21, 22

_HALF = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
_HALF_BACK = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
_STEPS = np.arange(256, dtype=np.float32)


class PictureSource(Protocol):
    """What pictures come from: an ImageStore, or a list in tests."""

    def __getitem__(self, index: int, /) -> Array: ...


class Tile(NamedTuple):
    """One picture's place on the canvas."""

    picture: int
    """Its index in the dataset."""
    image: Array
    """Its pixels, fetched once: a store that keeps nothing decodes at each request."""
    x: float
    """Canvas coordinates of the picture's corner; may be negative."""
    y: float


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What one output shows: tiles on a canvas, and the matrix from canvas to output."""

    tiles: tuple[Tile, ...]
    canvas_hw: Size
    """Pixels of the canvas; what a tile has beyond it is cut off."""
    matrix: Array
    """[3,3] canvas to output, continuous coordinates."""
    scale: float
    """Scale factor of the matrix, for the area that a box had before it was cut."""


def training_item(
    dataset: Dataset,
    store: PictureSource,
    hyp: Hyp,
    image_size: int | Size,
    *,
    seed: int,
    epoch: int,
    index: int,
    repeat: int = 0,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """Return the augmented picture [h,w,3] uint8 RGB and its labels [n,5] float32 class, xywhn.

    `image_size` is the side of a square, or height and width, which a mosaic cannot have. `repeat` counts how
    often the epoch has shown the picture before, so that no two look alike. The same (seed, epoch, index,
    repeat) gives the same bytes whatever else was drawn. Labels lie within [0,1]. `out`, if given, receives
    the picture. Copy-paste is applied to mosaics, and to labels with polygons.
    """
    hw = (image_size, image_size) if isinstance(image_size, int) else image_size
    out = np.empty((*hw, 3), np.uint8) if out is None else out
    stream = picture_stream(seed, epoch, index + repeat * len(dataset.images))
    draws = stream.random((2, _DRAWS))
    first, second = draws.tolist()
    flips = _flip_matrix(hyp, first, hw)
    if first[_U_MOSAIC] < hyp.mosaic:
        side = max(hw)
        pasting = (hyp.copy_paste, stream) if hyp.copy_paste else None
        labels = _render(_mosaic(dataset, store, hyp, side, first, index), flips, dataset, out, pasting)
        if first[_U_MIXUP] < hyp.mixup:
            other = np.empty_like(out)
            view = _mosaic(dataset, store, hyp, side, second, int(second[_U_FIRST] * len(dataset.images)))
            more = _render(view, flips, dataset, other, pasting)
            share = float(stream.beta(32.0, 32.0))  # mixup: Zhang et al., ICLR 2018
            cv2.addWeighted(out, share, other, 1 - share, 0.0, dst=out)
            labels = np.concatenate((labels, more))
    else:
        labels = _render(_single(store, hyp, hw, first, index), flips, dataset, out)
    _jitter_colour(out, hyp, first)
    return out, labels


def _mosaic(
    dataset: Dataset, store: PictureSource, hyp: Hyp, side: int, draws: list[float], index: int
) -> View:
    """Lay four pictures around a random centre of a canvas of twice the side."""
    count = len(dataset.images)
    indices = [int(u * count) for u in draws[_U_PARTNER : _U_PARTNER + 3]]
    indices.insert(int(draws[_U_CORNER] * 4), index)
    centre_x, centre_y = (round(side * (0.5 + u)) for u in draws[_U_CENTRE : _U_CENTRE + 2])
    tiles = []
    for corner, which in enumerate(indices):
        image = store[which]
        height, width = image.shape[:2]
        x = centre_x if corner & 1 else centre_x - width
        y = centre_y if corner & 2 else centre_y - height
        tiles.append(Tile(which, image, x, y))
    matrix, scale = _canvas_matrix(hyp, draws, (2 * side, 2 * side), (side, side))
    return View(tiles=tuple(tiles), canvas_hw=(2 * side, 2 * side), matrix=matrix, scale=scale)


def _single(store: PictureSource, hyp: Hyp, hw: Size, draws: list[float], index: int) -> View:
    """Centre one picture, which fits the output, on a canvas of the output's size."""
    image = store[index]
    height, width = image.shape[:2]
    tile = Tile(index, image, (hw[1] - width) // 2, (hw[0] - height) // 2)
    matrix, scale = _canvas_matrix(hyp, draws, hw, hw)
    return View(tiles=(tile,), canvas_hw=hw, matrix=matrix, scale=scale)


def _canvas_matrix(hyp: Hyp, draws: list[float], canvas_hw: Size, out_hw: Size) -> tuple[Array, float]:
    """Return T·S·R·P·C, canvas to output: centre, perspective, rotate and scale, shear, translate."""

    def spread(position: int, amplitude: float) -> float:
        return (2 * draws[position] - 1) * amplitude

    half_h, half_w = canvas_hw[0] / 2, canvas_hw[1] / 2
    scale = 1 + spread(_U_SCALE, hyp.scale)
    move_x = (0.5 + spread(_U_TRANSLATE, hyp.translate)) * out_hw[1]
    move_y = (0.5 + spread(_U_TRANSLATE + 1, hyp.translate)) * out_hw[0]
    if not (hyp.degrees or hyp.shear or hyp.perspective):
        return np.array(
            [[scale, 0, move_x - scale * half_w], [0, scale, move_y - scale * half_h], [0, 0, 1]]
        ), scale
    centre = np.array([[1, 0, -half_w], [0, 1, -half_h], [0, 0, 1]])
    tilt = np.eye(3)
    tilt[2, 0] = spread(_U_PERSPECTIVE, hyp.perspective)
    tilt[2, 1] = spread(_U_PERSPECTIVE + 1, hyp.perspective)
    angle = math.radians(spread(_U_ROTATE, hyp.degrees))
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    rotate = np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]])
    shear = np.eye(3)
    shear[0, 1] = math.tan(math.radians(spread(_U_SHEAR, hyp.shear)))
    shear[1, 0] = math.tan(math.radians(spread(_U_SHEAR + 1, hyp.shear)))
    translate = np.array([[1, 0, move_x], [0, 1, move_y], [0, 0, 1]])
    return translate @ shear @ rotate @ tilt @ centre, scale


def _flip_matrix(hyp: Hyp, draws: list[float], hw: Size) -> Array | None:
    """Return the flips as a matrix, so that they cost nothing; None for no flip."""
    up, left = draws[_U_FLIPUD] < hyp.flipud, draws[_U_FLIPLR] < hyp.fliplr
    if not (up or left):
        return None
    height, width = hw
    return np.array(
        [[-1 if left else 1, 0, width * left], [0, -1 if up else 1, height * up], [0, 0, 1]], float
    )


def _render(
    view: View,
    flips: Array | None,
    dataset: Dataset,
    out: Array,
    pasting: tuple[float, np.random.Generator] | None = None,
) -> Array:
    """Paint the view into `out` [h,w,3] and return its labels [n,5] class, xywhn."""
    matrix = view.matrix if flips is None else flips @ view.matrix
    (a, b, c), (d, e, f), (g, h, _) = matrix.tolist()
    aligned = b == d == g == h == 0
    out[:] = FILL
    boxes, outlines = [], Outlines()
    for number, tile in enumerate(view.tiles):
        height, width = tile.image.shape[:2]
        # The part of the picture that lies on the canvas, in its own pixels.
        left, top = max(-tile.x, 0), max(-tile.y, 0)
        right, bottom = min(width, view.canvas_hw[1] - tile.x), min(height, view.canvas_hw[0] - tile.y)
        rows = dataset.labels[tile.picture]
        if len(rows):
            boxes.append(_on_canvas(rows, tile, width, height, view.canvas_hw))
            if dataset.polygons:
                polygons = dataset.polygons[tile.picture]
                outlines.add(polygons, boxes[-1], (width, height), (tile.x, tile.y), view.canvas_hw, number)
        if right <= left or bottom <= top:
            continue
        part = tile.image[top:bottom, left:right]
        x, y = tile.x + left, tile.y + top
        if aligned:
            _paint_aligned(part, a, a * x + c, e, e * y + f, out)
        else:
            _paint(part, matrix @ np.array([[1, 0, x], [0, 1, y], [0, 0, 1]]), out)
    if not boxes:
        return np.zeros((0, 5), np.float32)
    labels = np.concatenate(boxes)
    if pasting is not None and outlines.points:
        labels = _paste(labels, outlines, view, matrix, out, *pasting)
    return _transform_labels(
        labels, matrix, aligned, view.scale, (out.shape[0], out.shape[1]), outlines.points
    )


def _paste(
    labels: Array,
    outlines: Outlines,
    view: View,
    matrix: Array,
    out: Array,
    probability: float,
    stream: np.random.Generator,
) -> Array:
    """Paint some outlined objects once more, mirrored at the canvas's middle; return the labels [n,5] of all."""
    width = view.canvas_hw[1]
    mirror = np.array([[-1, 0, width], [0, 1, 0], [0, 0, 1]], float)
    added = []
    for index, box in choose_pastes(labels[:, 1:], outlines.points, probability, width, stream):
        points, tile = outlines.points[index], view.tiles[outlines.tiles[index]]
        assert points is not None
        # Only the pixels around the object, in the tile's own pixels, with one more for the interpolation.
        limit = np.array(tile.image.shape[1::-1])
        low = np.clip(np.floor(points.min(0)) - (tile.x + 1, tile.y + 1), 0, limit).astype(int)
        high = np.clip(np.ceil(points.max(0)) - (tile.x - 1, tile.y - 1), 0, limit).astype(int)
        part = tile.image[low[1] : high[1], low[0] : high[0]]
        place = np.array([[1, 0, tile.x + low[0]], [0, 1, tile.y + low[1]], [0, 0, 1]])
        mirrored = through(points, mirror)
        if part.size:
            _paint(part, matrix @ mirror @ place, out, through(mirrored, matrix))
        added.append(np.array([(labels[index, 0], *box)], labels.dtype))
        outlines.points.append(mirrored)
    return np.concatenate((labels, *added))


def _paint_aligned(part: Array, a: float, c: float, e: float, f: float, out: Array) -> None:
    """Sample `part` where x -> a·x + c, y -> e·y + f puts it; a and e are negative in a flip.

    The covered pixels are a rectangle. Neighbouring tiles round their common edge alike, so there is
    neither gap nor overlap between them.
    """
    x0, x1 = sorted((c, a * part.shape[1] + c))
    y0, y1 = sorted((f, e * part.shape[0] + f))
    left, right = max(round(x0), 0), min(round(x1), out.shape[1])
    top, bottom = max(round(y0), 0), min(round(y1), out.shape[0])
    if right <= left or bottom <= top:
        return
    inverse = np.array(
        [[1 / a, 0, (left + 0.5 - c) / a - 0.5], [0, 1 / e, (top + 0.5 - f) / e - 0.5]]
    )  # from pixel centre to pixel centre, which is what OpenCV counts in
    cv2.warpAffine(
        part,
        inverse,
        (right - left, bottom - top),
        dst=out[top:bottom, left:right],
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )


def _paint(part: Array, matrix: Array, out: Array, outline: Polygon | None = None) -> None:
    """Sample `part` where a general `matrix` [3,3] puts it, inside the quadrangle that it covers.

    `outline` [k,2] in output pixels, if given, is filled in place of the quadrangle.
    """
    height, width = part.shape[:2]
    corners = np.array([[0, width, width, 0], [0, 0, height, height], [1, 1, 1, 1]])
    projected = matrix @ corners
    if (projected[2] <= 1e-6).any():  # behind the viewer: far beyond any sane perspective
        return
    shape = (projected[:2] / projected[2]).T if outline is None else outline
    left, top = np.maximum(np.floor(shape.min(0)), 0).astype(int).tolist()
    right, bottom = np.minimum(np.ceil(shape.max(0)), out.shape[1::-1]).astype(int).tolist()
    if right <= left or bottom <= top:
        return
    to_centres = _HALF_BACK @ np.array([[1, 0, -left], [0, 1, -top], [0, 0, 1]]) @ matrix @ _HALF
    size = (right - left, bottom - top)
    if to_centres[2, 0] or to_centres[2, 1]:
        warped = cv2.warpPerspective(part, to_centres, size, borderMode=cv2.BORDER_REPLICATE)
    else:
        warped = cv2.warpAffine(part, to_centres[:2], size, borderMode=cv2.BORDER_REPLICATE)
    mask = np.zeros((size[1], size[0]), np.uint8)
    points = np.rint((shape - (left + 0.5, top + 0.5)) * 16).astype(np.int32)
    if outline is None:
        cv2.fillConvexPoly(mask, points, 255, shift=4)
    else:
        cv2.fillPoly(mask, [points], 255, shift=4)
    cv2.copyTo(warped, mask, out[top:bottom, left:right])


def _on_canvas(rows: Array, tile: Tile, width: int, height: int, canvas_hw: Size) -> Array:
    """Return labels as [n,5] float32 class, xyxy in canvas pixels, cut off at the canvas's edge."""
    boxes = np.empty_like(rows)
    boxes[:, 0] = rows[:, 0]
    half = rows[:, 3:5] / 2
    size, corner = (width, height), (tile.x, tile.y)
    boxes[:, 1:3] = (rows[:, 1:3] - half) * size + corner
    boxes[:, 3:5] = (rows[:, 1:3] + half) * size + corner
    corners = boxes[:, 1:]
    np.clip(corners, 0, (*canvas_hw[::-1], *canvas_hw[::-1]), out=corners)
    return boxes


def _transform_labels(
    boxes: Array,
    matrix: Array,
    aligned: bool,
    scale: float,
    out_hw: Size,
    outlines: Sequence[Polygon | None] = (),
) -> Array:
    """Return labels [n,5] class, xywhn of canvas boxes seen through `matrix`; what is hardly in view goes.

    `outlines`, one a box or none at all, give tighter boxes than the corners of a turned box do.
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
    low, high = np.clip(low, 0, out_wh), np.clip(high, 0, out_wh)
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


def _jitter_colour(image: Array, hyp: Hyp, draws: list[float]) -> None:
    """Scale hue, saturation and value of `image` in place, through one table of three columns."""
    if not (hyp.hsv_h or hyp.hsv_s or hyp.hsv_v):
        return
    u = draws[_U_HSV : _U_HSV + 3]
    gains = [
        1 + (2 * x - 1) * amplitude for x, amplitude in zip(u, (hyp.hsv_h, hyp.hsv_s, hyp.hsv_v), strict=True)
    ]
    table = np.outer(_STEPS, np.array(gains, np.float32))
    table[:, 0] %= 180  # OpenCV's hue is in steps of two degrees
    np.minimum(table, 255, out=table)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    cv2.LUT(hsv, table.astype(np.uint8).reshape(256, 1, 3), dst=hsv)
    cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB, dst=image)
