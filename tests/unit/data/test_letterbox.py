"""Letterboxing agrees with the golden vectors and its pixels and boxes agree with each other."""

from __future__ import annotations

import json

import numpy as np
import torch

from starling.data.augment.letterbox import FILL, apply_letterbox, boxes_to_original, letterbox_geometry
from tests.conftest import REPOSITORY

GOLDEN = REPOSITORY / "tests" / "golden" / "vectors" / "letterbox.json"


def test_geometry_agrees_exactly_with_every_golden_case() -> None:
    cases = json.loads(GOLDEN.read_text())
    assert len(cases) == 120
    for case in cases:
        geometry = letterbox_geometry(tuple(case["hw"]), case["new"], case["minimal"], case["upscale"])
        assert list(geometry.out_hw) == case["out_hw"], case
        assert geometry.ratio == case["ratio"], case
        assert list(geometry.pad_wh) == case["pad_wh"], case
        (pad_w, pad_h), (out_h, out_w) = geometry.pad_wh, geometry.out_hw
        area = np.array([[pad_w, pad_h, out_w - pad_w, out_h - pad_h]])
        back = boxes_to_original(area, geometry, tuple(case["hw"]))[0]
        assert abs(back - case["box_back"]).max() < 5.1e-4, case  # the vectors hold three decimals


def test_image_lies_where_the_geometry_says_and_the_rest_is_grey() -> None:
    image = np.full((40, 80, 3), 200, np.uint8)
    geometry = letterbox_geometry((40, 80), 64, minimal=False)
    boxed = apply_letterbox(image, geometry)
    assert boxed.shape == (64, 64, 3)
    assert (boxed[16:48] == 200).all()
    assert (boxed[:16] == FILL).all()
    assert (boxed[48:] == FILL).all()


def test_an_odd_spare_pixel_goes_right_or_below() -> None:
    geometry = letterbox_geometry((31, 32), 32, minimal=False)
    assert geometry.pad_wh == (0.0, 0.5)
    boxed = apply_letterbox(np.zeros((31, 32, 3), np.uint8), geometry)
    assert (boxed[31] == FILL).all()
    assert (boxed[0] == 0).all()


def test_a_rectangle_bounds_both_sides() -> None:
    geometry = letterbox_geometry((100, 100), (64, 96), minimal=False)
    assert geometry.resized_hw == (64, 64)
    assert geometry.pad_wh == (16.0, 0.0)


def test_boxes_map_back_alike_for_arrays_and_tensors_and_keep_other_columns() -> None:
    geometry = letterbox_geometry((480, 640), 320, minimal=False)
    boxes = torch.tensor([[10.0, 50.0, 400.0, 200.0, 0.9, 2.0]])
    mapped = boxes_to_original(boxes, geometry, (480, 640))
    assert mapped.tolist()[0][:4] == [20.0, 20.0, 640.0, 320.0]
    assert torch.equal(mapped[:, 4:], boxes[:, 4:])
    assert np.allclose(boxes_to_original(boxes.numpy(), geometry, (480, 640)), mapped.numpy())
    assert boxes[0, 0] == 10.0
