"""Frames convert back and forth, and overlaps agree with each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from starling.boxes.geometry import (
    iou_aligned_xywh,
    iou_matrix,
    xywh_to_xyxy,
    xywhn_to_xyxy,
    xyxy_to_xywh,
    xyxy_to_xywhn,
)


def random_xyxy(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * 200
    return torch.cat((low, low + 1 + torch.rand(count, 2, generator=generator) * 80), dim=1)


def test_frames_convert_back_to_themselves() -> None:
    corners = random_xyxy(20)
    torch.testing.assert_close(xywh_to_xyxy(xyxy_to_xywh(corners)), corners)
    torch.testing.assert_close(xywhn_to_xyxy(xyxy_to_xywhn(corners, (240, 320)), (240, 320)), corners)


def test_normalised_boxes_are_fractions_of_width_and_height_in_that_order() -> None:
    whole = torch.tensor([[0.5, 0.5, 1.0, 1.0]])
    assert xywhn_to_xyxy(whole, (240, 320)).tolist() == [[0, 0, 320, 240]]


def test_aligned_overlap_is_the_diagonal_of_the_matrix() -> None:
    a, b = random_xyxy(30, 1), random_xyxy(30, 2)
    torch.testing.assert_close(
        iou_aligned_xywh(xyxy_to_xywh(a), xyxy_to_xywh(b)), iou_matrix(a, b).diagonal(), atol=1e-5, rtol=1e-4
    )


def test_equal_boxes_overlap_fully_and_distant_ones_less_than_nothing() -> None:
    a = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    far = torch.tensor([[90.0, 90.0, 100.0, 100.0]])
    for kind in ("iou", "giou", "diou", "ciou"):
        assert iou_aligned_xywh(xyxy_to_xywh(a), xyxy_to_xywh(a), kind).item() == pytest.approx(1.0, abs=1e-5)
    assert iou_aligned_xywh(xyxy_to_xywh(a), xyxy_to_xywh(far), "iou").item() == 0
    for kind in ("giou", "diou", "ciou"):
        assert iou_aligned_xywh(xyxy_to_xywh(a), xyxy_to_xywh(far), kind).item() < -0.5
