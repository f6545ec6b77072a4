"""Convert boxes between frames, and compute their overlap.

A suffix names the frame: `_xyxy` two corners, `_xywh` centre and size, both in pixels; `_xywhn` centre and size as
fractions of the image.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

IouKind = Literal["iou", "giou", "diou", "ciou"]

_EPS = 1e-7


def xywh_to_xyxy(boxes_xywh: Tensor) -> Tensor:
    """Turn [...,4] centre and size into corners."""
    centre, half = boxes_xywh[..., :2], boxes_xywh[..., 2:4] / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def xyxy_to_xywh(boxes_xyxy: Tensor) -> Tensor:
    """Turn [...,4] corners into centre and size."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:4]
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def xywhn_to_xyxy(boxes_xywhn: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Turn [...,4] fractions of an image of `size_hw` pixels into corners in pixels."""
    height, width = size_hw
    return xywh_to_xyxy(boxes_xywhn * boxes_xywhn.new_tensor([width, height, width, height]))


def xyxy_to_xywhn(boxes_xyxy: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Turn [...,4] corners in pixels into fractions of an image of `size_hw` pixels."""
    height, width = size_hw
    return xyxy_to_xywh(boxes_xyxy) / boxes_xyxy.new_tensor([width, height, width, height])


def iou_aligned_xywh(a_xywh: Tensor, b_xywh: Tensor, kind: IouKind = "iou") -> Tensor:
    """Return the pairwise overlap of boxes: [...,4] and [...,4] -> [...].

    GIoU: Rezatofighi et al. 2019; DIoU and CIoU: Zheng et al. 2020, with no gradient through the aspect's weight.
    """
    a_xy, a_wh = a_xywh[..., :2], a_xywh[..., 2:4]
    b_xy, b_wh = b_xywh[..., :2], b_xywh[..., 2:4]
    a_low, a_high = a_xy - a_wh / 2, a_xy + a_wh / 2
    b_low, b_high = b_xy - b_wh / 2, b_xy + b_wh / 2
    inter = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0).prod(-1)
    union = a_wh.prod(-1) + b_wh.prod(-1) - inter + _EPS
    iou = inter / union
    if kind == "iou":
        return iou
    hull = torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)
    if kind == "giou":
        area = hull.prod(-1) + _EPS
        return iou - (area - union) / area
    distance = (b_xy - a_xy).square().sum(-1) / (hull.square().sum(-1) + _EPS)
    if kind == "diou":
        return iou - distance
    angle = torch.atan(b_wh[..., 0] / (b_wh[..., 1] + _EPS)) - torch.atan(
        a_wh[..., 0] / (a_wh[..., 1] + _EPS)
    )
    aspect = (4 / math.pi**2) * angle.square()
    with torch.no_grad():
        alpha = aspect / (aspect - iou + (1 + _EPS))
    return iou - distance - aspect * alpha


def iou_matrix(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Return [...,N,M] IoU of every box of [...,N,4] with every box of [...,M,4]."""
    a, b = a_xyxy[..., :, None, :4].unbind(-1), b_xyxy[..., None, :, :4].unbind(-1)
    width = torch.minimum(a[2], b[2]) - torch.maximum(a[0], b[0])
    height = torch.minimum(a[3], b[3]) - torch.maximum(a[1], b[1])
    inter = width.clamp_(min=0) * height.clamp_(min=0)
    a_area, b_area = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    return inter / (a_area + b_area - inter + _EPS)
