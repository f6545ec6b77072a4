"""Letterboxing: fit an image into a shape without distorting it, and map boxes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    Boxes = TypeVar("Boxes", np.ndarray[Any, Any], Tensor)
else:
    Boxes = TypeVar("Boxes")

FILL = 114
"""Grey level of padding, equal in every channel."""

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Letterbox:
    """The position of an image inside its letterboxed version."""

    resized_hw: Size
    """Size of the image after resizing, before padding."""
    out_hw: Size
    """Size of the output, padding included."""
    ratio: float
    """Pixels of the output per pixel of the original, the same on both axes."""
    pad_wh: tuple[float, float]
    """Padding of one side: x, y in output pixels. A half means that right or bottom has one pixel more."""

    @property
    def offset_xy(self) -> tuple[int, int]:
        """Output pixel of the image's first pixel."""
        return int(self.pad_wh[0]), int(self.pad_wh[1])


def letterbox_geometry(
    hw: Size, new: int | Size, minimal: bool = True, upscale: bool = True, stride: int = 32
) -> Letterbox:
    """Return the geometry that fits an image of `hw` pixels, centred, into `new`.

    `new` is a side in pixels (a square) or (height, width). With `minimal` each side is padded only up to the
    next multiple of `stride` instead of up to `new`; without `upscale` an image is never enlarged.
    """
    height, width = (new, new) if isinstance(new, int) else new
    ratio = min(height / hw[0], width / hw[1])
    if not upscale:
        ratio = min(ratio, 1.0)
    resized_h, resized_w = max(round(hw[0] * ratio), 1), max(round(hw[1] * ratio), 1)
    spare_h, spare_w = height - resized_h, width - resized_w
    if minimal:
        spare_h, spare_w = spare_h % stride, spare_w % stride
    return Letterbox(
        resized_hw=(resized_h, resized_w),
        out_hw=(resized_h + spare_h, resized_w + spare_w),
        ratio=ratio,
        pad_wh=(spare_w / 2, spare_h / 2),
    )


def apply_letterbox(
    image: np.ndarray[Any, Any], geometry: Letterbox, out: np.ndarray[Any, Any] | None = None
) -> np.ndarray[Any, Any]:
    """Return `image` [H,W,3] uint8 resized and padded with grey by `geometry`, written to `out` if given."""
    import cv2  # imported here, because the geometry alone needs no OpenCV

    if out is None:
        out = np.empty((*geometry.out_hw, image.shape[2]), np.uint8)
    height, width = geometry.resized_hw
    x, y = geometry.offset_xy
    if geometry.resized_hw != geometry.out_hw:
        out[:] = FILL
    if image.shape[:2] != geometry.resized_hw:
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    out[y : y + height, x : x + width] = image
    return out


def boxes_to_original(boxes_xyxy: Boxes, geometry: Letterbox, original_hw: Size) -> Boxes:
    """Map boxes [..., 4 or more] from letterboxed pixels to pixels of the original, clipped to the image.

    Takes a NumPy array or a tensor and returns a new one; columns after the fourth are kept.
    """
    boxes: Any = boxes_xyxy
    mapped = boxes.clone() if hasattr(boxes, "clone") else boxes.copy()
    for axis in (0, 1):
        corner = (mapped[..., axis:4:2] - geometry.pad_wh[axis]) / geometry.ratio
        mapped[..., axis:4:2] = corner.clip(0, original_hw[1 - axis])
    return mapped
