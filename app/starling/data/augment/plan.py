"""Plan what a training item shows, without reading a pixel: a pure function of (seed, epoch, index).

The classic recipe pastes four images on a canvas of twice the side, warps the canvas and cuts out the
middle. Here the canvas is never painted. For each image the whole chain (place on the canvas, centre,
perspective, rotate and scale, shear, translate, flip) is one 3x3 matrix, and each image is sampled once,
directly into the part of the output that the image covers. Copy-paste is one more sample, mirrored.

A plan holds the samples and the labels; starling.data.augment.paint paints it on the CPU, device_paint on a GPU.
Matrices act on continuous coordinates, in which pixel i covers [i, i+1), as box edges do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from starling.config.hyp import Hyp
from starling.data.augment.item_labels import labels_in_view, labels_on_canvas
from starling.data.augment.letterbox import Letterbox, Size
from starling.data.augment.outlines import Outlines, choose_pastes, through
from starling.data.augment.streams import image_stream
from starling.data.dataset.dataset import Dataset
from starling.data.dataset.labels import Polygon

Array = np.ndarray[Any, Any]

# The position of each uniform random number in a view's row of draws.
_U_MOSAIC, _U_MIXUP, _U_FIRST, _U_PARTNER, _U_CENTRE = 0, 1, 2, 3, 6
_U_PERSPECTIVE, _U_ROTATE, _U_SCALE, _U_SHEAR, _U_TRANSLATE = 8, 10, 11, 12, 14
_U_FLIPUD, _U_FLIPLR, _U_HSV, _U_CORNER, _DRAWS = 16, 17, 18, 21, 22


class Region(NamedTuple):
    """A rectangle of whole pixels; `right` and `bottom` are exclusive."""

    left: int
    top: int
    right: int
    bottom: int


class Sample(NamedTuple):
    """A part of one image, and the place in the output where the part is sampled."""

    image: int
    """Index of the image in the dataset."""
    part: Region
    """Pixels of the stored image; beyond the part its edge pixels are repeated."""
    matrix: Array
    """[3,3] from the part to the output, continuous coordinates."""
    frame: Region
    """Pixels of the output that the sample may cover, at least one."""
    outline: Array | None
    """[k,2] output coordinates of the area that the sample covers within the frame; None for the whole frame."""
    pasted: bool
    """Whether the outline is an object's polygon of any shape; otherwise it is the part's four corners."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ItemPlan:
    """One training item: what to paint in which order, and the labels."""

    hw: Size
    """Size of the output in pixels."""
    layers: tuple[tuple[Sample, ...], ...]
    """Samples, later ones painted over earlier ones, on grey; two layers are blended."""
    share: float
    """Weight of the first layer in the blend."""
    gains: Array | None
    """[3] float32: factors of hue, saturation and value; None leaves the colours unchanged."""
    labels: Array
    """[n,5] float32 class, xywhn, within [0,1]."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class QuadPlan:
    """One image of twice the side: the first item enlarged, or up to four items in two rows of two."""

    items: tuple[ItemPlan, ...]
    """One to four items of equal size."""
    enlarged: bool

    @property
    def labels(self) -> Array:
        """[n,5] float32 class, xywhn, within the whole image."""
        if self.enlarged:
            return self.items[0].labels
        found = []
        for number, item in enumerate(self.items):
            row, column = divmod(number, 2)
            labels = item.labels.copy()
            labels[:, 1:5] /= 2
            labels[:, 1:3] += (column / 2, row / 2)
            found.append(labels)
        return np.concatenate(found)


class Tile(NamedTuple):
    """One image's place on the canvas."""

    image: int
    """Index of the image in the dataset."""
    hw: Size
    """Stored size of the image in pixels."""
    x: int
    """Canvas coordinates of the image's top left corner; may be negative."""
    y: int


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """The content of one layer: tiles on a canvas, and the matrix from canvas to output."""

    tiles: tuple[Tile, ...]
    canvas_hw: Size
    """Size of the canvas in pixels; tiles are clipped to the canvas."""
    matrix: Array
    """[3,3] canvas to output, continuous coordinates."""
    scale: float
    """Scale factor of the matrix, from which the unclipped area of a box follows."""


def plan_item(
    dataset: Dataset,
    shapes_hw: Array,
    hyp: Hyp,
    hw: Size,
    *,
    seed: int,
    epoch: int,
    index: int,
    repeat: int = 0,
) -> ItemPlan:
    """Return the plan of one item of `hw` pixels; a mosaic must be square.

    `shapes_hw` [N,2] are the images' stored pixels. `repeat` counts how often the epoch has shown the image before, so
    that repetitions differ. The same (seed, epoch, index, repeat) gives the same plan, independent of all other items.
    Copy-paste applies only to mosaics and to labels with polygons.
    """
    stream = image_stream(seed, epoch, index + repeat * len(dataset.images))
    draws = stream.random((2, _DRAWS))
    first, second = draws.tolist()
    flips = _flip_matrix(hyp, first, hw)
    share = 1.0
    if first[_U_MOSAIC] < hyp.mosaic:
        side = max(hw)
        pasting = (hyp.copy_paste, stream) if hyp.copy_paste else None
        samples, labels = _plan_view(_mosaic(shapes_hw, hyp, side, first, index), flips, dataset, hw, pasting)
        layers = [samples]
        if first[_U_MIXUP] < hyp.mixup:
            view = _mosaic(shapes_hw, hyp, side, second, int(second[_U_FIRST] * len(dataset.images)))
            samples, more = _plan_view(view, flips, dataset, hw, pasting)
            layers.append(samples)
            labels = np.concatenate((labels, more))
            share = float(stream.beta(32.0, 32.0))  # mixup: Zhang et al., ICLR 2018
    else:
        samples, labels = _plan_view(_single(shapes_hw, hyp, hw, first, index), flips, dataset, hw)
        layers = [samples]
    return ItemPlan(hw=hw, layers=tuple(layers), share=share, gains=_colour_gains(hyp, first), labels=labels)


def plan_letterbox(image: int, stored_hw: Size, geometry: Letterbox, labels: Array) -> ItemPlan:
    """Return the plan that shows image number `image` letterboxed, for validation.

    `stored_hw` is the image's stored size, from which the geometry starts; `labels` [n,5] class, xywhn are relative to
    the image, the labels of the plan are relative to the letterbox.
    """
    (height, width), (x, y) = geometry.resized_hw, geometry.offset_xy
    matrix = np.array([[width / stored_hw[1], 0, x], [0, height / stored_hw[0], y], [0, 0, 1]])
    whole = Region(0, 0, stored_hw[1], stored_hw[0])
    sample = Sample(image, whole, matrix, Region(x, y, x + width, y + height), None, False)
    out_wh = np.array(geometry.out_hw[::-1], np.float32)
    resized_wh = np.array((width, height), np.float32)
    moved = labels.copy()
    moved[:, 1:3] = (labels[:, 1:3] * resized_wh + geometry.pad_wh) / out_wh
    moved[:, 3:5] *= resized_wh / out_wh
    return ItemPlan(hw=geometry.out_hw, layers=((sample,),), share=1.0, gains=None, labels=moved)


def _mosaic(shapes_hw: Array, hyp: Hyp, side: int, draws: list[float], index: int) -> View:
    """Place four images around a random centre of a canvas of twice the side."""
    count = len(shapes_hw)
    indices = [int(u * count) for u in draws[_U_PARTNER : _U_PARTNER + 3]]
    indices.insert(int(draws[_U_CORNER] * 4), index)
    centre_x, centre_y = (round(side * (0.5 + u)) for u in draws[_U_CENTRE : _U_CENTRE + 2])
    tiles = []
    for corner, which in enumerate(indices):
        height, width = shapes_hw[which].tolist()
        x = centre_x if corner & 1 else centre_x - width
        y = centre_y if corner & 2 else centre_y - height
        tiles.append(Tile(which, (height, width), x, y))
    matrix, scale = _canvas_matrix(hyp, draws, (2 * side, 2 * side), (side, side))
    return View(tiles=tuple(tiles), canvas_hw=(2 * side, 2 * side), matrix=matrix, scale=scale)


def _single(shapes_hw: Array, hyp: Hyp, hw: Size, draws: list[float], index: int) -> View:
    """Centre one image, which must fit the output, on a canvas of the output's size."""
    height, width = shapes_hw[index].tolist()
    tile = Tile(index, (height, width), (hw[1] - width) // 2, (hw[0] - height) // 2)
    matrix, scale = _canvas_matrix(hyp, draws, hw, hw)
    return View(tiles=(tile,), canvas_hw=hw, matrix=matrix, scale=scale)


def _canvas_matrix(hyp: Hyp, draws: list[float], canvas_hw: Size, out_hw: Size) -> tuple[Array, float]:
    """Return the matrix T·S·R·P·C from canvas to output: centre, perspective, rotate and scale, shear, translate."""

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
    """Return the flips as a matrix, which costs no extra pass over the pixels; None for no flip."""
    up, left = draws[_U_FLIPUD] < hyp.flipud, draws[_U_FLIPLR] < hyp.fliplr
    if not (up or left):
        return None
    height, width = hw
    return np.array(
        [[-1 if left else 1, 0, width * left], [0, -1 if up else 1, height * up], [0, 0, 1]], float
    )


def _colour_gains(hyp: Hyp, draws: list[float]) -> Array | None:
    """Return the factors [3] of hue, saturation and value; None for no change."""
    amplitudes = (hyp.hsv_h, hyp.hsv_s, hyp.hsv_v)
    if not any(amplitudes):
        return None
    u = draws[_U_HSV : _U_HSV + 3]
    return np.array(
        [1 + (2 * x - 1) * amplitude for x, amplitude in zip(u, amplitudes, strict=True)], np.float32
    )


def _plan_view(
    view: View,
    flips: Array | None,
    dataset: Dataset,
    hw: Size,
    pasting: tuple[float, np.random.Generator] | None = None,
) -> tuple[tuple[Sample, ...], Array]:
    """Return the samples that show the view in an output of `hw` pixels, and the labels [n,5] class, xywhn."""
    matrix = view.matrix if flips is None else flips @ view.matrix
    (a, b, c), (d, e, f), (g, h, _) = matrix.tolist()
    aligned = b == d == g == h == 0
    samples: list[Sample | None] = []
    for tile in view.tiles:
        height, width = tile.hw
        # The part of the image that lies on the canvas, in image pixels.
        left, top = max(-tile.x, 0), max(-tile.y, 0)
        right, bottom = min(width, view.canvas_hw[1] - tile.x), min(height, view.canvas_hw[0] - tile.y)
        if right <= left or bottom <= top:
            continue
        part = Region(left, top, right, bottom)
        x, y = tile.x + left, tile.y + top
        if aligned:
            samples.append(_aligned_sample(tile.image, part, a, a * x + c, e, e * y + f, hw))
        else:
            place = np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])
            samples.append(_turned_sample(tile.image, part, matrix @ place, hw))
    labels, outlines = _labels_of(view, dataset)
    if pasting is not None and outlines.points:
        pasted, labels = _paste(labels, outlines, view, matrix, hw, *pasting)
        samples += pasted
    if len(labels):
        labels = labels_in_view(labels, matrix, aligned, view.scale, hw, outlines.points)
    return tuple(sample for sample in samples if sample is not None), labels


def _labels_of(view: View, dataset: Dataset) -> tuple[Array, Outlines]:
    """Return the labels of all tiles [n,5] class, xyxy in canvas pixels, and their polygons."""
    rows = [dataset.labels[tile.image] for tile in view.tiles]
    places = [(tile.x, tile.y, *tile.hw[::-1]) for tile in view.tiles]
    boxes, outlines = labels_on_canvas(rows, places, view.canvas_hw), Outlines()
    if dataset.polygons:
        first = 0
        for number, (tile, some) in enumerate(zip(view.tiles, rows, strict=True)):
            own = boxes[first : first + len(some)]  # a NumPy view: the polygons make these boxes tighter
            polygons = dataset.polygons[tile.image]
            outlines.add(polygons, own, tile.hw[::-1], (tile.x, tile.y), view.canvas_hw, number)
            first += len(some)
    return boxes, outlines


def _paste(
    labels: Array,
    outlines: Outlines,
    view: View,
    matrix: Array,
    hw: Size,
    probability: float,
    stream: np.random.Generator,
) -> tuple[list[Sample | None], Array]:
    """Paste some outlined objects, mirrored at the canvas's middle; return their samples and all labels [n,5]."""
    width = view.canvas_hw[1]
    mirror = np.array([[-1, 0, width], [0, 1, 0], [0, 0, 1]], float)
    samples, added = [], []
    for index, box in choose_pastes(labels[:, 1:], outlines.points, probability, width, stream):
        points, tile = outlines.points[index], view.tiles[outlines.tiles[index]]
        assert points is not None
        # Sample only the pixels around the object, in tile pixels, with a margin of one pixel for the interpolation.
        limit = np.array(tile.hw[::-1])
        low = np.clip(np.floor(points.min(0)) - (tile.x + 1, tile.y + 1), 0, limit).astype(int)
        high = np.clip(np.ceil(points.max(0)) - (tile.x - 1, tile.y - 1), 0, limit).astype(int)
        place = np.array([[1, 0, tile.x + low[0]], [0, 1, tile.y + low[1]], [0, 0, 1]])
        mirrored = through(points, mirror)
        if (high > low).all():
            part = Region(*low.tolist(), *high.tolist())
            seen = through(mirrored, matrix)
            samples.append(_turned_sample(tile.image, part, matrix @ mirror @ place, hw, seen))
        added.append(np.array([(labels[index, 0], *box)], labels.dtype))
        outlines.points.append(mirrored)
    return samples, np.concatenate((labels, *added))


def _aligned_sample(
    image: int, part: Region, a: float, c: float, e: float, f: float, hw: Size
) -> Sample | None:
    """Return the sample of a part mapped by x -> a·x + c, y -> e·y + f (a, e negative in a flip); None if out of view.

    The covered pixels are a rectangle. Neighbouring tiles round their common edge in the same way, so that there is
    neither gap nor overlap between them.
    """
    x0, x1 = sorted((c, a * (part.right - part.left) + c))
    y0, y1 = sorted((f, e * (part.bottom - part.top) + f))
    left, right = max(round(x0), 0), min(round(x1), hw[1])
    top, bottom = max(round(y0), 0), min(round(y1), hw[0])
    if right <= left or bottom <= top:
        return None
    matrix = np.array([[a, 0, c], [0, e, f], [0, 0, 1]])
    return Sample(image, part, matrix, Region(left, top, right, bottom), None, False)


def _turned_sample(
    image: int, part: Region, matrix: Array, hw: Size, outline: Polygon | None = None
) -> Sample | None:
    """Return the sample of a part mapped by a general `matrix`, inside its projected quadrangle; None if out of view.

    `outline` [k,2] in output pixels, if given, replaces the quadrangle.
    """
    width, height = part.right - part.left, part.bottom - part.top
    corners = np.array([[0, width, width, 0], [0, 0, height, height], [1, 1, 1, 1]])
    projected = matrix @ corners
    if (projected[2] <= 1e-6).any():  # behind the viewer: only an extreme perspective does that
        return None
    shape = (projected[:2] / projected[2]).T if outline is None else outline
    left, top = np.maximum(np.floor(shape.min(0)), 0).astype(int).tolist()
    right, bottom = np.minimum(np.ceil(shape.max(0)), hw[::-1]).astype(int).tolist()
    if right <= left or bottom <= top:
        return None
    return Sample(image, part, matrix, Region(left, top, right, bottom), shape, outline is not None)
