"""Training items: mosaic, affine, colour and flips, each a pure function of (seed, epoch, index).

The classic recipe pastes four pictures on a canvas of twice the side, warps that canvas and cuts out the
middle. Here the canvas is never painted. For each picture the whole chain (place on the canvas, centre,
perspective, rotate and scale, shear, translate, flip) is one 3x3 matrix, and each picture is sampled once,
straight into the part of the output that it covers.

Matrices act on continuous coordinates, in which pixel i covers [i, i+1), as box edges do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np

from app.config.hyp import Hyp
from app.data.dataset import Dataset
from app.data.letterbox import FILL

Array = np.ndarray[Any, Any]

MIN_BOX_SIDE = 2.0
"""A label is dropped when a side of it is this short in output pixels, or shorter."""
MIN_AREA_LEFT = 0.1
"""... or when this part of its area, or less, is left in view."""
MAX_ASPECT = 100.0
"""... or when it became this thin."""

_ORDER = 0xFFFF_FFFF
"""Index of the random stream that orders an epoch; no dataset has so many pictures."""

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
    canvas: int
    """Side of the canvas in pixels; what a tile has beyond it is cut off."""
    matrix: Array
    """[3,3] canvas to output, continuous coordinates."""
    scale: float
    """Scale factor of the matrix, for the area that a box had before it was cut."""


def random_stream(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the random numbers of one item: Philox (Salmon et al., SC 2011) keyed by seed, epoch and index."""
    key = np.array((seed & 0xFFFF_FFFF_FFFF_FFFF, (epoch & 0xFFFF_FFFF) << 32 | index), np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def epoch_order(seed: int, epoch: int, length: int) -> Array:
    """Return the order of an epoch: a permutation of range(length), int64."""
    return random_stream(seed, epoch, _ORDER).permutation(length)


def training_item(
    dataset: Dataset,
    store: PictureSource,
    hyp: Hyp,
    image_size: int,
    *,
    seed: int,
    epoch: int,
    index: int,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """Return the augmented picture [s,s,3] uint8 RGB and its labels [n,5] float32 class, xywhn.

    The same (seed, epoch, index) gives the same bytes whatever else was drawn. Labels lie within [0,1].
    `out`, if given, receives the picture. copy_paste is not applied: labels are kept as boxes, and it needs
    polygons.
    """
    side = image_size
    out = np.empty((side, side, 3), np.uint8) if out is None else out
    stream = random_stream(seed, epoch, index)
    draws = stream.random((2, _DRAWS))
    first, second = draws.tolist()
    flips = _flip_matrix(hyp, first, side)
    if first[_U_MOSAIC] < hyp.mosaic:
        labels = _render(_mosaic(dataset, store, hyp, side, first, index), flips, dataset, side, out)
        if first[_U_MIXUP] < hyp.mixup:
            other = np.empty_like(out)
            view = _mosaic(dataset, store, hyp, side, second, int(second[_U_FIRST] * len(dataset.images)))
            more = _render(view, flips, dataset, side, other)
            share = float(stream.beta(32.0, 32.0))  # mixup: Zhang et al., ICLR 2018
            cv2.addWeighted(out, share, other, 1 - share, 0.0, dst=out)
            labels = np.concatenate((labels, more))
    else:
        labels = _render(_single(store, hyp, side, first, index), flips, dataset, side, out)
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
    matrix, scale = _canvas_matrix(hyp, draws, 2 * side, side)
    return View(tiles=tuple(tiles), canvas=2 * side, matrix=matrix, scale=scale)


def _single(store: PictureSource, hyp: Hyp, side: int, draws: list[float], index: int) -> View:
    """Centre one picture, whose longest side is `side`, on a canvas of the output's size."""
    image = store[index]
    height, width = image.shape[:2]
    tile = Tile(index, image, (side - width) // 2, (side - height) // 2)
    matrix, scale = _canvas_matrix(hyp, draws, side, side)
    return View(tiles=(tile,), canvas=side, matrix=matrix, scale=scale)


def _canvas_matrix(hyp: Hyp, draws: list[float], canvas: int, side: int) -> tuple[Array, float]:
    """Return T·S·R·P·C, canvas to output: centre, perspective, rotate and scale, shear, translate."""

    def spread(position: int, amplitude: float) -> float:
        return (2 * draws[position] - 1) * amplitude

    half = canvas / 2
    scale = 1 + spread(_U_SCALE, hyp.scale)
    move_x = (0.5 + spread(_U_TRANSLATE, hyp.translate)) * side
    move_y = (0.5 + spread(_U_TRANSLATE + 1, hyp.translate)) * side
    if not (hyp.degrees or hyp.shear or hyp.perspective):
        return np.array(
            [[scale, 0, move_x - scale * half], [0, scale, move_y - scale * half], [0, 0, 1]]
        ), scale
    centre = np.array([[1, 0, -half], [0, 1, -half], [0, 0, 1]])
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


def _flip_matrix(hyp: Hyp, draws: list[float], side: int) -> Array | None:
    """Return the flips as a matrix, so that they cost nothing; None for no flip."""
    up, left = draws[_U_FLIPUD] < hyp.flipud, draws[_U_FLIPLR] < hyp.fliplr
    if not (up or left):
        return None
    return np.array([[-1 if left else 1, 0, side * left], [0, -1 if up else 1, side * up], [0, 0, 1]], float)


def _render(view: View, flips: Array | None, dataset: Dataset, side: int, out: Array) -> Array:
    """Paint the view into `out` [side,side,3] and return its labels [n,5] class, xywhn."""
    matrix = view.matrix if flips is None else flips @ view.matrix
    (a, b, c), (d, e, f), (g, h, _) = matrix.tolist()
    aligned = b == d == g == h == 0
    out[:] = FILL
    boxes = []
    for tile in view.tiles:
        height, width = tile.image.shape[:2]
        # The part of the picture that lies on the canvas, in its own pixels.
        left, top = max(-tile.x, 0), max(-tile.y, 0)
        right, bottom = min(width, view.canvas - tile.x), min(height, view.canvas - tile.y)
        rows = dataset.labels[tile.picture]
        if len(rows):
            boxes.append(_on_canvas(rows, tile, width, height, view.canvas))
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
    return _transform_labels(np.concatenate(boxes), matrix, aligned, view.scale, side)


def _paint_aligned(part: Array, a: float, c: float, e: float, f: float, out: Array) -> None:
    """Sample `part` where x -> a·x + c, y -> e·y + f puts it; a and e are negative in a flip.

    The covered pixels are a rectangle. Neighbouring tiles round their common edge alike, so there is
    neither gap nor overlap between them.
    """
    side = out.shape[0]
    x0, x1 = sorted((c, a * part.shape[1] + c))
    y0, y1 = sorted((f, e * part.shape[0] + f))
    left, right = max(round(x0), 0), min(round(x1), side)
    top, bottom = max(round(y0), 0), min(round(y1), side)
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


def _paint(part: Array, matrix: Array, out: Array) -> None:
    """Sample `part` where a general `matrix` [3,3] puts it, inside the quadrangle that it covers."""
    side = out.shape[0]
    height, width = part.shape[:2]
    corners = np.array([[0, width, width, 0], [0, 0, height, height], [1, 1, 1, 1]])
    projected = matrix @ corners
    if (projected[2] <= 1e-6).any():  # behind the viewer: far beyond any sane perspective
        return
    quad = (projected[:2] / projected[2]).T
    left, top = np.maximum(np.floor(quad.min(0)), 0).astype(int).tolist()
    right, bottom = np.minimum(np.ceil(quad.max(0)), side).astype(int).tolist()
    if right <= left or bottom <= top:
        return
    to_centres = _HALF_BACK @ np.array([[1, 0, -left], [0, 1, -top], [0, 0, 1]]) @ matrix @ _HALF
    size = (right - left, bottom - top)
    if to_centres[2, 0] or to_centres[2, 1]:
        warped = cv2.warpPerspective(part, to_centres, size, borderMode=cv2.BORDER_REPLICATE)
    else:
        warped = cv2.warpAffine(part, to_centres[:2], size, borderMode=cv2.BORDER_REPLICATE)
    mask = np.zeros((size[1], size[0]), np.uint8)
    points = np.rint((quad - (left + 0.5, top + 0.5)) * 16).astype(np.int32)
    cv2.fillConvexPoly(mask, points, 255, shift=4)
    cv2.copyTo(warped, mask, out[top:bottom, left:right])


def _on_canvas(rows: Array, tile: Tile, width: int, height: int, canvas: int) -> Array:
    """Return labels as [n,5] float32 class, xyxy in canvas pixels, cut off at the canvas's edge."""
    boxes = np.empty_like(rows)
    boxes[:, 0] = rows[:, 0]
    half = rows[:, 3:5] / 2
    size, corner = (width, height), (tile.x, tile.y)
    boxes[:, 1:3] = (rows[:, 1:3] - half) * size + corner
    boxes[:, 3:5] = (rows[:, 1:3] + half) * size + corner
    corners = boxes[:, 1:]
    if corners.min() < 0 or corners.max() > canvas:
        np.minimum(np.maximum(corners, 0, out=corners), canvas, out=corners)
    return boxes


def _transform_labels(boxes: Array, matrix: Array, aligned: bool, scale: float, side: int) -> Array:
    """Return labels [n,5] class, xywhn of canvas boxes seen through `matrix`; what is hardly in view goes."""
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
    low, high = np.clip(low, 0, side), np.clip(high, 0, side)
    size = high - low
    width, height = size[:, 0], size[:, 1]
    area_before = (xyxy[:, 2] - xyxy[:, 0]) * (xyxy[:, 3] - xyxy[:, 1]) * (scale * scale)
    keep = (size > MIN_BOX_SIDE).all(1) & (width * height > MIN_AREA_LEFT * area_before)
    keep &= (width < MAX_ASPECT * height) & (height < MAX_ASPECT * width)
    labels = np.empty((len(boxes), 5), np.float32)
    labels[:, 0] = boxes[:, 0]
    labels[:, 1:3] = (low + high) / (2 * side)
    labels[:, 3:5] = size / side
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
