"""Training items on the CPU: mosaic, affine, colour and flips, each a pure function of (seed, epoch, index)."""

from __future__ import annotations

from typing import Any

import numpy as np

from app.config.hyp import Hyp
from app.data.dataset import Dataset
from app.data.letterbox import Size
from app.data.paint import PictureSource, paint_item
from app.data.plan import plan_item

Array = np.ndarray[Any, Any]


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

    `image_size` is the side of a square, or height and width, which a mosaic cannot have; the rest is as
    `plan_item` has it. The same (seed, epoch, index, repeat) gives the same bytes whatever else was drawn.
    Labels lie within [0,1]. `out`, if given, receives the picture.
    """
    hw = (image_size, image_size) if isinstance(image_size, int) else image_size
    out = np.empty((*hw, 3), np.uint8) if out is None else out
    plan = plan_item(dataset, store.shapes_hw, hyp, hw, seed=seed, epoch=epoch, index=index, repeat=repeat)
    paint_item(plan, store, out)
    return out, plan.labels
