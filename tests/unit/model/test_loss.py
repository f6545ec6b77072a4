"""The loss keeps its promises beside the golden vectors: formats, padding, gains as data, determinism."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from starling.config.hyp import Hyp
from starling.core.errors import ConfigError
from starling.data.loader.prepare import TARGET_ROWS, filled_up
from starling.model.loss import DetectionLoss, LossGains

ANCHORS = torch.tensor([[[2.0, 2.0], [4.0, 4.0]], [[2.0, 2.0], [4.0, 4.0]]])
STRIDES = (8.0, 16.0)


def make(nc: int = 3, **gains: Any) -> DetectionLoss:
    return DetectionLoss(STRIDES, ANCHORS, nc, LossGains(**gains))


def predictions(nc: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 2, side, side, 5 + nc, generator=generator).requires_grad_() for side in (8, 4)]


TARGETS = torch.tensor(
    [[0, 1, 0.30, 0.40, 0.30, 0.30], [0, 2, 0.70, 0.71, 0.20, 0.40], [1, 0, 0.52, 0.48, 0.50, 0.60]]
)


def test_total_is_the_sum_of_parts_times_the_batch() -> None:
    total, parts = make()(predictions(), TARGETS)
    assert total.ndim == 0
    assert total.item() == pytest.approx(parts.sum().item() * 2, rel=1e-6)
    assert not parts.requires_grad


def test_targets_filled_up_for_a_gpu_lose_nothing_and_add_nothing() -> None:
    filled = filled_up(TARGETS)
    assert len(filled) == TARGET_ROWS
    assert torch.equal(filled[: len(TARGETS)], TARGETS)
    assert (filled[len(TARGETS) :, 0] < 0).all()
    assert len(filled_up(filled)) == TARGET_ROWS
    assert len(filled_up(TARGETS[:0])) == 0


def test_rows_with_a_negative_image_are_padding() -> None:
    padding = torch.zeros(5, 6)
    padding[:, 0] = -1
    plain, padded = predictions(), predictions()
    loss = make()
    total, _ = loss(plain, TARGETS)
    total_padded, _ = loss(padded, torch.cat((TARGETS, padding)))
    total.backward()
    total_padded.backward()
    assert total_padded.item() == pytest.approx(total.item(), rel=1e-6)
    for a, b in zip(plain, padded, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_loss_is_float32_under_autocast_and_for_bfloat16_predictions() -> None:
    half = [p.detach().bfloat16().requires_grad_() for p in predictions()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, parts = make()(half, TARGETS)
    exact, _ = make()([p.detach().float() for p in half], TARGETS)
    assert total.dtype == parts.dtype == torch.float32
    assert total.item() == pytest.approx(exact.item(), rel=1e-6)


def test_new_gains_take_effect_in_place() -> None:
    loss = make()
    values = loss._values
    loss.set_gains(LossGains(box=0.1, fl_gamma=1.5, label_smoothing=0.1, anchor_t=3.0))
    fresh = make(box=0.1, fl_gamma=1.5, label_smoothing=0.1, anchor_t=3.0)
    assert loss._values is values
    assert loss(predictions(), TARGETS)[0].item() == fresh(predictions(), TARGETS)[0].item()


def test_perfect_scores_have_finite_gradients_under_focal_loss_below_one() -> None:
    raw = predictions()
    with torch.no_grad():
        for level in raw:
            level[..., 4:] = 200.0
    make(fl_gamma=0.5)(raw, TARGETS)[0].backward()
    assert all(level.grad is not None and level.grad.isfinite().all() for level in raw)


@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_extreme_predictions_have_finite_gradients(logit: float) -> None:
    raw = [torch.full_like(level, logit).requires_grad_() for level in predictions()]
    total, _ = make()(raw, TARGETS)
    total.backward()
    assert total.isfinite()
    assert all(level.grad is not None and level.grad.isfinite().all() for level in raw)


def test_a_centre_on_the_image_border_matches_inside_the_map() -> None:
    edges = torch.tensor([[0, 0, 1.0, 1.0, 0.3, 0.3], [1, 0, 0.0, 0.0, 0.3, 0.3]])
    loss = make()
    matches = loss.match(0, (2, 2, 8, 8, 8), edges, torch.tensor(4.0))
    assert matches.matched.any()
    assert matches.cell.min() >= 0
    assert matches.cell.max() < 2 * 2 * 8 * 8
    assert loss(predictions(), edges)[0].isfinite()


def test_a_label_near_a_corner_of_its_cell_takes_three_cells() -> None:
    # Centre 3.25, 3.25 in cells of 8 px: own cell 3, 3 and the ones left and above.
    label = torch.tensor([[0, 0, 3.25 / 8, 3.25 / 8, 2 / 8, 2 / 8]])
    matches = make().match(0, (1, 2, 8, 8, 8), label, torch.tensor(1.5))
    cells = sorted(matches.cell[matches.matched].tolist())
    assert cells == [2 * 8 + 3, 3 * 8 + 2, 3 * 8 + 3]


def test_of_two_labels_in_one_cell_the_last_sets_objectness_every_time() -> None:
    twice = TARGETS[[0, 0, 0]].clone()
    twice[:, 4:] = torch.tensor([[0.25, 0.25], [0.3, 0.35], [0.4, 0.2]])
    results = {make()(predictions(), twice)[1][1].item() for _ in range(3)}
    assert len(results) == 1
    assert results == {make()(predictions(), twice)[1][1].item()}


def test_gains_scale_with_levels_classes_and_image_size() -> None:
    gains = LossGains.scaled(Hyp(), nc=40, levels=4, image_size=1280)
    assert gains.box == pytest.approx(0.05 * 3 / 4)
    assert gains.cls == pytest.approx(0.5 * 40 / 80 * 3 / 4)
    assert gains.obj == pytest.approx(1.0 * 4 * 3 / 4)
    assert gains.anchor_t == 4.0


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_gains_refuse_what_is_not_a_finite_positive_number(value: float) -> None:
    with pytest.raises(ConfigError, match="box"):
        LossGains(box=value)


def test_no_shape_depends_on_a_value() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Tensors without numbers: any mask, `nonzero` or `.item()` raises.
    with FakeTensorMode():
        loss = DetectionLoss(STRIDES, torch.empty(2, 2, 2), 3, LossGains(fl_gamma=1.5))
        raw = [torch.empty(2, 2, side, side, 8, requires_grad=True) for side in (8, 4)]
        total, parts = loss(raw, torch.empty(7, 6))
        total.backward()
    assert total.shape == ()
    assert parts.shape == (3,)
