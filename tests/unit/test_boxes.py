"""Frames convert back and forth, overlaps agree with each other, and suppression is exact however it is cut."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor

from app import boxes
from app.boxes import (
    iou_aligned_xywh,
    iou_matrix,
    non_max_suppression,
    xywh_to_xyxy,
    xywhn_to_xyxy,
    xyxy_to_xywh,
    xyxy_to_xywhn,
)


def random_xyxy(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * 200
    return torch.cat((low, low + 1 + torch.rand(count, 2, generator=generator) * 80), dim=1)


def random_predictions(count: int, nc: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([300.0, 300, 60, 60] + [1.0] * (1 + nc))
    return torch.rand(1, count, 5 + nc, generator=generator) * scale


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


def test_suppression_of_a_growing_head_equals_suppression_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = torch.cat([random_predictions(500, nc=3, seed=seed) for seed in range(3)])
    predictions[1, :, 4] *= 0.0012  # few candidates: this line is short
    whole = non_max_suppression(predictions, 0.001, 0.3, multi_label=True, max_detections=200)
    monkeypatch.setattr(boxes, "FIRST_HEAD", 40)
    cut = non_max_suppression(predictions, 0.001, 0.3, multi_label=True, max_detections=200)
    assert len(whole[0]) == 200
    assert 0 < len(whole[1]) < 200
    assert all(torch.equal(a, b) for a, b in zip(cut, whole, strict=True))


def test_images_of_a_batch_do_not_touch_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = torch.cat([random_predictions(200, nc=2, seed=seed) for seed in range(5)])
    alone = [non_max_suppression(image[None], 0.1, 0.4, multi_label=True)[0] for image in predictions]
    for together in (2, 32):
        monkeypatch.setattr(boxes, "IMAGES_TOGETHER", together)
        found = non_max_suppression(predictions, 0.1, 0.4, multi_label=True)
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


@pytest.mark.parametrize("head", [7, 2048])
def test_equal_confidences_keep_the_order_of_the_predictions(
    head: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boxes, "FIRST_HEAD", head)
    predictions = torch.tensor([[20.0 * i, 10, 10, 10, 0.5, 0.5, 0.5] for i in range(30)])[None]
    found = non_max_suppression(predictions, 0.1, 0.5, multi_label=True)[0]
    assert found[:, 0].tolist() == [20.0 * i - 5 for i in range(30) for _ in range(2)]
    assert found[:, 5].tolist() == [0, 1] * 30
    best = non_max_suppression(predictions, 0.1, 0.5, max_detections=4)[0]
    assert best[:, 0].tolist() == [-5, 15, 35, 55]
    assert best[:, 5].tolist() == [0] * 4


def test_predictions_that_are_no_numbers_are_no_candidates() -> None:
    predictions = random_predictions(50, nc=2)
    predictions[0, ::2, 4] = torch.nan
    found = non_max_suppression(predictions, 0.01, 0.99, multi_label=True)[0]
    assert torch.equal(found, non_max_suppression(predictions[:, 1::2], 0.01, 0.99, multi_label=True)[0])


def test_predictions_are_left_as_they_are() -> None:
    predictions = random_predictions(50, nc=2)
    before = predictions.clone()
    non_max_suppression(predictions, 0.3, classes=[1], multi_label=True)
    assert torch.equal(predictions, before)


def test_suppression_agrees_with_torchvision_class_by_class() -> None:
    predictions = random_predictions(400, nc=2)
    found = non_max_suppression(predictions, 0.3, 0.5, max_detections=1000)[0]
    rows = predictions[0]
    confidence, label = (rows[:, 5:] * rows[:, 4:5]).max(1)
    keep = (confidence > 0.3) & (rows[:, 4] > 0.3)
    corners = xywh_to_xyxy(rows[keep, :4])
    expected = torchvision.ops.batched_nms(corners, confidence[keep], label[keep], 0.5)
    assert torch.equal(found[:, :4], corners[expected])


def test_only_the_most_confident_candidates_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = random_predictions(300, nc=1)
    every = non_max_suppression(predictions, 0.01, 0.99, max_detections=300)[0]
    monkeypatch.setattr(boxes, "MAX_CANDIDATES", 20)
    few = non_max_suppression(predictions, 0.01, 0.99, max_detections=300)[0]
    assert len(few) <= 20
    assert torch.equal(few, every[: len(few)])


def test_nothing_above_the_threshold_gives_empty_detections() -> None:
    predictions = torch.zeros(2, 10, 8)
    for multi_label in (False, True):
        found = non_max_suppression(predictions, multi_label=multi_label)
        assert [tuple(f.shape) for f in found] == [(0, 6), (0, 6)]


def test_overlapping_boxes_of_two_classes_stay_unless_agnostic() -> None:
    row = torch.tensor([[50.0, 50, 20, 20, 1, 0.9, 0.0], [50.0, 50, 20, 20, 1, 0.0, 0.8]])
    assert len(non_max_suppression(row[None])[0]) == 2
    assert non_max_suppression(row[None], agnostic=True)[0][:, 5].tolist() == [0]
    assert non_max_suppression(row[None], classes=[1])[0][:, 5].tolist() == [1]
