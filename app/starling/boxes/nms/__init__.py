"""Non-maximum suppression: of boxes that overlap too much, only the most confident is kept.

Two implementations with bit-identical results. `host` runs image by image on all cores of a CPU, and examines as few
candidates as possible. `device` processes all images with a few large operations, which suits a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from starling.boxes.nms.rules import Rules


def non_max_suppression(
    predictions: Tensor,
    conf: float = 0.25,
    iou: float = 0.45,
    *,
    classes: Sequence[int] | None = None,
    agnostic: bool = False,
    multi_label: bool = False,
    max_detections: int = 300,
) -> list[Tensor]:
    """Keep the most confident of overlapping boxes; return [n,6] xyxy, confidence, class for each image.

    `predictions` is decoded [B, anchors, 5+nc]: xywh in pixels, objectness, class scores. A box is a candidate if its
    objectness and its objectness times class score exceed `conf`: for its best class, or with `multi_label` for every
    such class. A box is removed if it overlaps a more confident one of its class (`agnostic`: of any class) by more
    than `iou`. Of equal confidences, the first in the order of `predictions` counts as higher.
    """
    rules = Rules(
        conf=conf,
        iou=iou,
        classes=None if classes is None else tuple(classes),
        agnostic=agnostic,
        multi_label=multi_label,
        limit=max_detections,
    )
    # Import `host` only for a CPU, because its first import compiles it.
    if predictions.device.type == "cpu":
        from starling.boxes.nms.host import suppress
    else:
        from starling.boxes.nms.device import suppress
    return suppress(predictions.float(), rules)
