"""Matching: which detections find a label, at each of several overlaps.

Two ways to the same answer, as for suppression: `host` is compiled for a CPU, `device` takes a few large steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IOU_THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
"""COCO's ten: 0.50 to 0.95."""


def match_detections(
    detections: Tensor, labels: Tensor, thresholds: Sequence[float] = IOU_THRESHOLDS
) -> Tensor:
    """Return [m, thresholds] bool: which detections find a label of their class at each IoU threshold.

    `detections` [m,6] xyxy, confidence, class, the most confident first; `labels` [n,5] class, xyxy, in the same frame.
    Each detection claims the label it overlaps most; of several claims the first detection's counts.
    """
    image = torch.zeros(len(detections), dtype=torch.long, device=detections.device)
    return match_images(detections, image, labels[None], thresholds)


def match_images(
    detections: Tensor, image: Tensor, labels: Tensor, thresholds: Sequence[float] = IOU_THRESHOLDS
) -> Tensor:
    """Return what `match_detections` does for the detections of several images at once.

    `detections` [m,6], the most confident of an image first; `image` [m] says whose they are; `labels` [B,n,5] are
    those of each image, with a class below 0 where there are fewer than n.
    """
    limits = torch.tensor(thresholds, dtype=torch.float32)
    if not len(detections) or not labels.shape[1]:
        return torch.zeros(len(detections), len(limits), dtype=torch.bool, device=detections.device)
    # The host's way is compiled when it is first imported, which a GPU has no use for.
    if detections.device.type == "cpu":
        from starling.boxes.matching.host import match
    else:
        from starling.boxes.matching.device import match
    return match(detections, image, labels, limits)
