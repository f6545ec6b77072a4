"""Non-maximum suppression: of boxes that overlap too much, the most confident stays.

Two ways to the same boxes, to the bit. `host` takes image by image, on all cores of a CPU, and looks at no more
candidates than it must. `device` takes all images in a few large steps, as a GPU wants them.
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
    """Keep the most confident of overlapping boxes: one [n,6] xyxy, confidence, class for each image.

    `predictions` is decoded [B, anchors, 5+nc]: xywh in pixels, objectness, class scores. A box whose objectness and
    whose objectness times class score exceed `conf` is a candidate: for its best class, or with `multi_label` for every
    such class. Boxes of one class (`agnostic`: of any) that overlap a more confident one by more than `iou` go. Of
    equal confidences the first in the order of `predictions` counts as the higher.
    """
    rules = Rules(
        conf=conf,
        iou=iou,
        classes=None if classes is None else tuple(classes),
        agnostic=agnostic,
        multi_label=multi_label,
        limit=max_detections,
    )
    # The host's way is compiled when it is first imported, which a GPU has no use for.
    if predictions.device.type == "cpu":
        from starling.boxes.nms.host import suppress
    else:
        from starling.boxes.nms.device import suppress
    return suppress(predictions.float(), rules)
