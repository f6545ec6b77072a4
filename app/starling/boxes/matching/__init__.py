"""Match detections to labels at several IoU thresholds.

Two implementations with the same result, as for suppression: `host` is compiled for CPUs, `device` runs a few large
operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IOU_THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
"""COCO's ten thresholds: 0.50 to 0.95."""


def match_detections(
    detections: Tensor, labels: Tensor, thresholds: Sequence[float] = IOU_THRESHOLDS
) -> Tensor:
    """Return [m, thresholds] bool: whether each detection matches a label of its class at each IoU threshold.

    `detections` [m,6] xyxy, confidence, class, the most confident first; `labels` [n,5] class, xyxy, in the same frame.
    Each detection claims the label that it overlaps most; of several claims to a label, the first detection's counts.
    """
    image = torch.zeros(len(detections), dtype=torch.long, device=detections.device)
    return match_images(detections, image, labels[None], thresholds)


def match_images(
    detections: Tensor, image: Tensor, labels: Tensor, thresholds: Sequence[float] = IOU_THRESHOLDS
) -> Tensor:
    """Match the detections of several images at once, as `match_detections` does for one.

    `detections` [m,6], the most confident of an image first; `image` [m] is the index of each detection's image;
    `labels` [B,n,5] are each image's labels, padded to n with a class below 0.
    """
    limits = torch.tensor(thresholds, dtype=torch.float32)
    if not len(detections) or not labels.shape[1]:
        return torch.zeros(len(detections), len(limits), dtype=torch.bool, device=detections.device)
    # Import `host` only for a CPU, because its first import compiles it.
    if detections.device.type == "cpu":
        from starling.boxes.matching.host import match
    else:
        from starling.boxes.matching.device import match
    return match(detections, image, labels, limits)
