"""Images with texture, labels with polygons, and one case of each kind of augmentation, for several tests, and one item from plan to pixels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from starling.config.hyp import Hyp
from starling.data.augment.paint import paint_item
from starling.data.augment.plan import plan_item

Array = np.ndarray[Any, Any]

SIDE = 96
SHAPES = [(96, 72), (60, 96), (96, 96), (48, 96), (96, 50)]
_CORNERS = np.array([[0.1, 0.2], [0.4, 0.25], [0.45, 0.7], [0.15, 0.8]])

_STILL = Hyp(hsv_h=0.0, hsv_s=0.0, hsv_v=0.0, fliplr=0.0)
_TURNED = replace(_STILL, degrees=25.0, shear=8.0)

CASES: dict[str, tuple[Hyp, tuple[int, int]]] = {
    "mosaic": (_STILL, (SIDE, SIDE)),
    "flips": (replace(_STILL, fliplr=0.7, flipud=0.5), (SIDE, SIDE)),
    "colour": (Hyp(), (SIDE, SIDE)),
    "rotation and shear": (_TURNED, (SIDE, SIDE)),
    "perspective": (replace(_TURNED, perspective=0.001, fliplr=0.5), (SIDE, SIDE)),
    "mixup": (Hyp(mixup=1.0), (SIDE, SIDE)),
    "copy-paste": (replace(_STILL, copy_paste=1.0), (SIDE, SIDE)),
    "copy-paste, turned, in mixup": (replace(_TURNED, copy_paste=0.5, mixup=0.6, fliplr=0.5), (SIDE, SIDE)),
    "single": (Hyp(mosaic=0.0), (SIDE, SIDE)),
    "single, turned": (Hyp(mosaic=0.0, degrees=10.0, perspective=0.0005), (SIDE, SIDE)),
    "rectangle": (Hyp(mosaic=0.0), (128, 96)),
    "mosaic or single": (Hyp(mosaic=0.5, scale=0.9, translate=0.4), (SIDE, SIDE)),
}
"""Hyperparameters and output size [h,w] by what they are to show."""


class Sources(list[Array]):
    """Dataset images in memory, as a store gives them."""

    @property
    def shapes_hw(self) -> Array:
        """[N,2] height and width."""
        return np.array([image.shape[:2] for image in self])


def textured(scale: int = 1) -> tuple[Any, Sources]:
    """Return images of waves, blocks and noise, two labels each, the first with a polygon; as good as photographs.

    Made of whole numbers and one table of sines, so that no decoder's version matters.
    """
    rng = np.random.default_rng(0)
    store, labels, polygons = Sources(), [], []
    for number, (height, width) in enumerate(SHAPES):
        height, width = height * scale, width * scale
        y, x = np.mgrid[:height, :width] / scale
        waves = [np.sin((x * (2 + c) + y * (number + 1)) / (9 + 4 * c)) for c in range(3)]
        blocks = rng.integers(-40, 40, (height // 12 + 1, width // 12 + 1, 3)).repeat(12, 0).repeat(12, 1)
        image = 120 + 60 * np.stack(waves, 2) + blocks[:height, :width] + rng.normal(0, 4, (height, width, 3))
        store.append(np.clip(image, 0, 255).astype(np.uint8))
        corners = _CORNERS * (1 + 0.08 * number)
        low, high = corners.min(0), corners.max(0)
        rows = [[number, *((low + high) / 2), *(high - low)], [7, 0.75, 0.6, 0.3, 0.4]]
        labels.append(np.array(rows, np.float32))
        polygons.append((corners, None))
    images = [Path(str(number)) for number in range(len(SHAPES))]
    return SimpleNamespace(images=images, labels=labels, polygons=polygons), store


def training_item(
    dataset: Any,
    store: Any,
    hyp: Hyp,
    image_size: int | tuple[int, int],
    *,
    seed: int,
    epoch: int,
    index: int,
    repeat: int = 0,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """Return one augmented image [h,w,3] uint8 RGB, in `out` if given, and its labels [n,5] class, xywhn."""
    hw = (image_size, image_size) if isinstance(image_size, int) else image_size
    out = np.empty((*hw, 3), np.uint8) if out is None else out
    plan = plan_item(dataset, store.shapes_hw, hyp, hw, seed=seed, epoch=epoch, index=index, repeat=repeat)
    paint_item(plan, store, out)
    return out, plan.labels
