"""Match the detections of all images with a few large operations and without synchronising with the device."""

from __future__ import annotations

import torch
from torch import Tensor

from starling.boxes.geometry import iou_matrix


def match(detections: Tensor, image: Tensor, labels: Tensor, limits: Tensor) -> Tensor:
    """Return [m,T] bool, see `match_images`; `limits` [T] float32 is on the host, and no input is empty."""
    limits = limits.to(detections.device, non_blocking=True)
    theirs = labels[image]  # [m,n,5]
    same_class = detections[:, 5:6] == theirs[..., 0]
    overlap, label = (iou_matrix(detections[:, None], theirs[..., 1:5])[:, 0] * same_class).max(1)
    claims = overlap[:, None] >= limits  # [m,T]
    number = torch.arange(len(detections), device=detections.device)[:, None]
    claimed = (image * labels.shape[1] + label)[:, None].expand_as(claims)
    nobody = number.new_full((labels.shape[0] * labels.shape[1], len(limits)), len(detections))
    first = nobody.scatter_reduce(0, claimed, number.where(claims, len(detections)), "amin")
    return claims & (first.gather(0, claimed) == number)
