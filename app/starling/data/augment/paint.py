"""Paint a plan on the CPU with OpenCV: the reference for starling.data.augment.device_paint, which paints on a GPU."""

from __future__ import annotations

from typing import Any, Protocol

import cv2
import numpy as np

from starling.data.augment.letterbox import FILL
from starling.data.augment.plan import ItemPlan, QuadPlan, Region, Sample

Array = np.ndarray[Any, Any]

_HALF = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
_HALF_BACK = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
_STEPS = np.arange(256, dtype=np.float32)


class ImageSource(Protocol):
    """The source of images: an ImageStore, or a list in tests."""

    @property
    def shapes_hw(self) -> Array:
        """[N,2] height and width of each image."""

    def __getitem__(self, index: int, /) -> Array: ...


def paint_item(plan: ItemPlan, store: ImageSource, out: Array) -> None:
    """Paint `plan` into `out` [h,w,3] uint8 RGB of the plan's size."""
    fetched: dict[int, Array] = {}  # each image once: a store without a cache decodes at each request
    for layer in plan.layers:
        for sample in layer:
            if sample.image not in fetched:
                fetched[sample.image] = store[sample.image]
    _paint_layer(plan.layers[0], fetched, out)
    for layer in plan.layers[1:]:
        other = np.empty_like(out)
        _paint_layer(layer, fetched, other)
        cv2.addWeighted(out, plan.share, other, 1 - plan.share, 0.0, dst=out)
    if plan.gains is not None:
        _jitter_colour(out, plan.gains)


def paint_quad(plan: QuadPlan, store: ImageSource, out: Array) -> None:
    """Paint `plan` into `out` [2h,2w,3], twice the size of its items."""
    height, width = plan.items[0].hw
    if plan.enlarged:
        small = np.empty((height, width, 3), np.uint8)
        paint_item(plan.items[0], store, small)
        cv2.resize(small, (2 * width, 2 * height), dst=out, interpolation=cv2.INTER_LINEAR)
        return
    out[:] = FILL  # the last group of an epoch may have fewer than four items
    for number, item in enumerate(plan.items):
        top, left = (number >> 1) * height, (number & 1) * width
        paint_item(item, store, out[top : top + height, left : left + width])


def outline_mask(outline: Array, frame: Region, pasted: bool) -> Array:
    """Return [h,w] uint8 over the frame's pixels: 255 inside `outline` [k,2] in output pixels, 0 outside.

    An outline of a `pasted` object has any shape; other outlines are convex.
    """
    mask = np.zeros((frame.bottom - frame.top, frame.right - frame.left), np.uint8)
    points = np.rint((outline - (frame.left + 0.5, frame.top + 0.5)) * 16).astype(np.int32)
    if pasted:
        cv2.fillPoly(mask, [points], 255, shift=4)
    else:
        cv2.fillConvexPoly(mask, points, 255, shift=4)
    return mask


def _paint_layer(samples: tuple[Sample, ...], images: dict[int, Array], out: Array) -> None:
    out[:] = FILL
    for sample in samples:
        left, top, right, bottom = sample.part
        part = images[sample.image][top:bottom, left:right]
        left, top, right, bottom = sample.frame
        place = out[top:bottom, left:right]
        if sample.outline is None:
            _paint_aligned(part, sample, place)
        else:
            _paint_turned(part, sample, place)


def _paint_aligned(part: Array, sample: Sample, place: Array) -> None:
    """Sample `part` into its whole frame; the matrix only scales, mirrors and moves."""
    (a, _, c), (_, e, f), _ = sample.matrix.tolist()
    left, top = sample.frame[:2]
    inverse = np.array(
        [[1 / a, 0, (left + 0.5 - c) / a - 0.5], [0, 1 / e, (top + 0.5 - f) / e - 0.5]]
    )  # from pixel centre to pixel centre, as OpenCV counts
    cv2.warpAffine(
        part,
        inverse,
        (place.shape[1], place.shape[0]),
        dst=place,
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )


def _paint_turned(part: Array, sample: Sample, place: Array) -> None:
    """Sample `part` into its outline."""
    left, top = sample.frame[:2]
    to_centres = _HALF_BACK @ np.array([[1, 0, -left], [0, 1, -top], [0, 0, 1]]) @ sample.matrix @ _HALF
    size = (place.shape[1], place.shape[0])
    if to_centres[2, 0] or to_centres[2, 1]:
        warped = cv2.warpPerspective(part, to_centres, size, borderMode=cv2.BORDER_REPLICATE)
    else:
        warped = cv2.warpAffine(part, to_centres[:2], size, borderMode=cv2.BORDER_REPLICATE)
    assert sample.outline is not None
    cv2.copyTo(warped, outline_mask(sample.outline, sample.frame, sample.pasted), place)


def _jitter_colour(image: Array, gains: Array) -> None:
    """Scale hue, saturation and value of `image` in place, through one lookup table of three columns."""
    table = np.outer(_STEPS, gains)
    table[:, 0] %= 180  # OpenCV's hue is in steps of two degrees
    np.minimum(table, 255, out=table)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    cv2.LUT(hsv, table.astype(np.uint8).reshape(256, 1, 3), dst=hsv)
    cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB, dst=image)
