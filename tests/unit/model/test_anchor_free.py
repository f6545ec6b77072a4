"""The anchor-free head and its loss keep their promises beside the golden vectors."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from starling.config.hyp import Hyp
from starling.core.errors import ConfigError, UsageError
from starling.data.loader.prepare import filled_up
from starling.model.anchor_free import assignment
from starling.model.anchor_free.assignment import POSITIVES, Assignment, assign
from starling.model.anchor_free.loss import AnchorFreeGains, AnchorFreeLoss, Flat
from starling.model.anchor_free.points import BINS, distances_of, grid
from starling.model.detector import build_detector
from starling.model.loss import Share
from tests.conftest import REPOSITORY

STRIDES = (8.0, 16.0)
SIDE = 64
CELLS = grid([(8, 8), (4, 4)], STRIDES, torch.device("cpu"))
TARGETS = torch.tensor(
    [
        [0, 1, 0.30, 0.40, 0.30, 0.30],
        [0, 2, 0.32, 0.41, 0.20, 0.40],
        [1, 0, 0.52, 0.48, 0.50, 0.60],
        [1, 0, 0.10, 0.10, 0.02, 0.02],
    ]
)


def predictions(nc: int = 3, seed: int = 0, images: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(images, 4 * BINS + nc, side, side, generator=generator).requires_grad_()
        for side in (8, 4)
    ]


def make(nc: int = 3) -> AnchorFreeLoss:
    return AnchorFreeLoss(STRIDES, nc, AnchorFreeGains())


def assigned(raw: list[Tensor], targets: Tensor) -> Assignment:
    loss = make()
    return loss.assign(Flat.of(raw, STRIDES, 3), targets)


def test_total_is_the_sum_of_parts_times_the_batch() -> None:
    total, parts = make()(predictions(), TARGETS)
    assert total.ndim == 0
    assert total.item() == pytest.approx(parts.sum().item() * 2, rel=1e-6)
    assert not parts.requires_grad


@pytest.mark.parametrize("fill", ["padding", "for a gpu"])
def test_rows_with_a_negative_image_are_padding(fill: str) -> None:
    padding = torch.zeros(5, 6)
    padding[:, 0] = -1
    padded = filled_up(TARGETS) if fill == "for a gpu" else torch.cat((padding, TARGETS))
    plain, other = predictions(), predictions()
    total, _ = make()(plain, TARGETS)
    same, _ = make()(other, padded)
    total.backward()
    same.backward()
    assert same.item() == pytest.approx(total.item(), rel=1e-6)
    assert all(
        torch.allclose(a.grad, b.grad, atol=1e-6)  # type: ignore[arg-type]
        for a, b in zip(plain, other, strict=True)
    )


def test_a_batch_without_targets_teaches_that_nothing_is_there() -> None:
    raw = predictions()
    total, parts = make()(raw, TARGETS[:0])
    total.backward()
    assert parts[0] == parts[2] == 0
    assert parts[1] > 0
    assert all(torch.isfinite(level.grad).all() for level in raw)  # type: ignore[arg-type]


def test_parts_of_several_processes_add_up_to_the_whole_batch() -> None:
    raw = predictions(images=4, seed=1)
    targets = torch.cat((TARGETS, TARGETS + torch.tensor([2.0, 0, 0.1, 0.05, 0, 0])))
    whole, whole_parts = make()(raw, targets)
    weights = []
    halves = [([level[i : i + 2] for level in raw], targets[targets[:, 0] // 2 == i // 2]) for i in (0, 2)]
    halves = [
        (levels, rows - torch.tensor([float(i), 0, 0, 0, 0, 0]))
        for (levels, rows), i in zip(halves, (0, 2), strict=True)
    ]
    for levels, rows in halves:
        weights.append(make().assign(Flat.of(levels, STRIDES, 3), rows).weight.sum())
    pooled = torch.stack(weights).sum()
    found = [
        make()(levels, rows, Share(images=4, part=0.5, pool=lambda value: pooled)) for levels, rows in halves
    ]
    assert sum(total.item() for total, _ in found) == pytest.approx(whole.item(), rel=1e-5)
    assert torch.allclose(sum(parts for _, parts in found), whole_parts, rtol=1e-5)  # type: ignore[arg-type]


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 40))
def test_each_point_learns_one_target_at_most_and_lies_inside_it(seed: int, count: int, pairs: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.rand(count, 6, generator=generator)
    targets[:, 0] = torch.randint(-1, 2, (count,), generator=generator)
    targets[:, 1] = torch.randint(0, 3, (count,), generator=generator)
    raw = predictions(seed=seed)
    found = assigned(raw, targets)
    positive = found.point[found.positive]
    assert len(positive.unique()) == len(positive)
    assert (found.weight[~found.positive] == 0).all()
    assert ((found.weight >= 0) & (found.weight <= 1 + 1e-5)).all()
    corners = Flat.of(raw, STRIDES, 3).in_pixels(targets)[found.target[found.positive]]
    centre, half = (corners[:, :2] + corners[:, 2:]) / 2, (corners[:, 2:] - corners[:, :2]).clamp(min=16) / 2
    away = (CELLS.points_xy[positive % len(CELLS.points_xy)] - centre).abs()
    assert (away <= half + 1e-4).all()
    assert (targets[found.target[found.positive], 0] == positive // len(CELLS.points_xy)).all()
    monkeypatch = pytest.MonkeyPatch()
    try:  # in parts of any size
        monkeypatch.setattr(assignment, "MOST_PAIRS", pairs * len(CELLS.points_xy))
        again = assigned(raw, targets)
    finally:
        monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_a_target_takes_its_ten_best_points_and_its_best_has_the_weight_of_its_overlap() -> None:
    target = torch.tensor([[0, 0, 0.5, 0.5, 0.9, 0.9]])
    boxes = torch.tensor([[[3.2, 3.2, 60.8, 60.8]]]).repeat(1, len(CELLS.points_xy), 1)
    scores = torch.linspace(0.1, 0.9, len(CELLS.points_xy)).view(1, -1, 1)
    found = assign(boxes, scores, CELLS.points_xy, target, torch.tensor([[3.2, 3.2, 60.8, 60.8]]), 16.0)
    assert int(found.positive.sum()) == POSITIVES
    assert found.weight.max().item() == pytest.approx(1, abs=1e-4)
    taken = found.point[found.positive]
    inside = ((CELLS.points_xy > 3.2) & (CELLS.points_xy < 60.8)).all(1).nonzero().flatten()
    assert taken.sort().values.tolist() == inside[-POSITIVES:].tolist()


def test_a_distance_is_the_expectation_of_its_bins_and_a_box_comes_back_from_its_distances() -> None:
    logits = torch.full((1, 4 * BINS), -40.0)
    for side, bin_ in enumerate((0, 3, 15, 7)):
        logits[0, side * BINS + bin_] = 40.0
    assert distances_of(logits)[0].tolist() == pytest.approx([0, 3, 15, 7], abs=1e-6)
    boxes = torch.rand(len(CELLS.points_xy), 4) * 20
    assert torch.allclose(CELLS.boxes_xyxy(CELLS.distances(boxes)), boxes, atol=1e-4)


def test_the_distribution_learns_the_two_bins_beside_a_distance() -> None:
    raw = predictions(nc=1, images=1)
    loss = AnchorFreeLoss(STRIDES, 1, AnchorFreeGains(box=0.0, cls=0.0, dfl=1.0))
    total, _ = loss(raw, torch.tensor([[0, 0, 0.5, 0.5, 0.7, 0.7]]))
    total.backward()
    gradient = raw[0].grad
    assert gradient is not None
    cell = gradient[0, :BINS, 4, 4]  # point (36, 36): its left side is 26.4 px, 3.3 cells away
    assert (cell < 0).nonzero().flatten().tolist() == [3, 4]


def test_gains_change_in_place_and_are_checked() -> None:
    loss = make()
    _, before = loss(predictions(), TARGETS)
    loss.set_gains(AnchorFreeGains(box=15.0, cls=0.25, dfl=0.0))
    _, after = loss(predictions(), TARGETS)
    assert torch.allclose(after, before * torch.tensor([2.0, 0.5, 0.0]))
    for bad in (-1.0, math.inf, math.nan):
        with pytest.raises(ConfigError):
            AnchorFreeGains(dfl=bad)


def test_hyperparameters_of_the_other_head_are_refused_with_the_file_to_take() -> None:
    anchored, free = (build_detector(name, nc=3).head for name in ("yolov5n.yaml", "yolov5nu.yaml"))
    with pytest.raises(UsageError, match=r"hyp\.u-scratch\.yaml"):
        free.build_loss(Hyp(), 64)
    with pytest.raises(UsageError, match=r"hyp\.scratch-low\.yaml"):
        anchored.build_loss(Hyp(dfl=1.5), 64)


def test_a_layout_says_of_itself_whether_it_has_anchors_and_is_built_again_from_that() -> None:
    free = build_detector("yolov5nu.yaml", nc=2)
    assert free.head.anchors_px is None
    assert "anchors" not in free.layout
    again = build_detector(free.layout, nc=2)
    assert [(k, v.shape) for k, v in again.state_dict().items()] == [
        (k, v.shape) for k, v in free.state_dict().items()
    ]
    with pytest.raises(ConfigError, match="anchor-free"):
        build_detector("yolov5nu.yaml", nc=2, anchors=3)


def test_folded_normalisations_answer_the_same() -> None:
    torch.manual_seed(0)
    detector = build_detector(REPOSITORY / "tests" / "tiny-u.yaml", nc=3)
    images = torch.rand(2, 3, 64, 64)
    detector(images)
    plain, fused = detector.eval()(images)[0], detector.fused()(images)[0]
    assert torch.allclose(plain, fused, atol=1e-3)
    assert (plain[..., 4] == 1).all()


_CROWD = """
import resource, torch
from starling.model.anchor_free.assignment import assign
from starling.model.anchor_free.points import grid
cells = grid([(80, 80), (40, 40), (20, 20)], (8, 16, 32), torch.device("cpu"))
points, images, each = len(cells.points_xy), 64, 100
targets = torch.rand(images * each, 6) * 0.5
targets[:, 0] = torch.arange(images).repeat_interleave(each)
boxes, scores = torch.rand(images, points, 4) * 640, torch.rand(images, points, 1)
centre, size = targets[:, 2:4] * 640 + 160, targets[:, 4:] * 200
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assign(boxes, scores, cells.points_xy, targets, torch.cat((centre - size, centre + size), 1), 16.0)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_the_assignment_of_6400_targets_at_640_px_takes_less_than_a_gibibyte() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CROWD],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert int(done.stdout) < 1024
