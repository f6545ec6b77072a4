"""Both ways of suppression keep exactly what torchvision keeps of each class, however the work is cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor

from app import suppression
from app.suppression import below, suppress_each, suppress_together

Way = Callable[..., list[Tensor]]
both_ways = pytest.mark.parametrize("way", [suppress_each, suppress_together])


def crowd(count: int, seed: int, classes: int = 3, spread: float = 120) -> Tensor:
    """Return [count,6] candidates, many on each other, in falling order of confidence with equal ones among them."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * spread
    boxes = torch.cat((low, low + 10 + torch.rand(count, 2, generator=generator) * 40), dim=1)
    confidence = torch.rand(count, 1, generator=generator).mul(50).ceil().div(50).sort(0, descending=True)[0]
    label = torch.randint(classes, (count, 1), generator=generator).float()
    return torch.cat((boxes, confidence, label), dim=1)


def padded(images: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(images, batch_first=True)


def by_torchvision(image: Tensor, iou: float, limit: int, agnostic: bool = False) -> Tensor:
    """Return what torchvision keeps, class by class, in the order of the candidates."""
    groups = torch.zeros(len(image)) if agnostic else image[:, 5]
    kept = torch.zeros(len(image), dtype=torch.bool)
    falling = torch.arange(len(image), 0, -1).float()  # it sorts, and not stably
    for group in groups.unique():
        of = (groups == group).nonzero()[:, 0]
        kept[of[torchvision.ops.nms(image[of, :4], falling[of], iou)]] = True
    return image[kept][:limit]


@both_ways
@pytest.mark.parametrize("iou", [0.0, 0.2, 0.6, 0.95])
@pytest.mark.parametrize("agnostic", [False, True])
def test_what_stays_is_what_torchvision_keeps(way: Way, iou: float, agnostic: bool) -> None:
    images = [crowd(900, 1), crowd(700, 2, spread=600), crowd(1, 3), crowd(130, 4, classes=1), crowd(0, 5)]
    for limit in (5, 300, 2000):
        found = way(padded(images), iou, limit, agnostic=agnostic)
        for rows, image in zip(found, images, strict=True):
            assert torch.equal(rows, by_torchvision(image, iou, limit, agnostic))


@both_ways
def test_small_chunks_and_blocks_change_nothing(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    image = crowd(400, 6)
    whole = way(image[None], 0.5, 300, agnostic=False)[0]
    for name, size in (("CHUNK", 37), ("BLOCK", 5), ("PIECE", 3)):
        monkeypatch.setattr(suppression, f"HOST_{name}", size)
    monkeypatch.setattr(suppression, "DEVICE_BLOCK", 7)
    assert torch.equal(way(image[None], 0.5, 300, agnostic=False)[0], whole)


@both_ways
def test_of_a_long_row_in_which_each_overlaps_the_next_every_second_stays(way: Way) -> None:
    image = torch.tensor([[3.0 * i, 0, 3.0 * i + 10, 10, 1 - i / 1000, 0] for i in range(200)])
    assert torch.equal(way(image[None], 0.5, 300, agnostic=False)[0], image[::2])


@both_ways
@pytest.mark.parametrize("iou", [0.5, 0.6, 0.7, 0.8])
def test_an_overlap_at_the_limit_is_judged_as_torchvision_judges_it(way: Way, iou: float) -> None:
    boxes = [[0.0, 0, 10, 10], [0.0, 0, 10, round(10 * iou)]]
    image = torch.tensor([[*box, 0.9 - i / 10, 0] for i, box in enumerate(boxes)])
    assert torch.equal(way(image[None], iou, 9, agnostic=False)[0], by_torchvision(image, iou, 9))


@both_ways
def test_boxes_without_area_all_stay(way: Way) -> None:
    image = torch.tensor([[5.0, 5, 5, 5, 0.9, 0], [5.0, 5, 5, 5, 0.8, 0], [0.0, 0, 9, 9, 0.7, 0]])
    assert torch.equal(way(image[None], 0.0, 9, agnostic=False)[0], image)


@both_ways
def test_no_candidates_leave_nothing(way: Way) -> None:
    assert [tuple(rows.shape) for rows in way(torch.zeros(2, 0, 6), 0.5, 9, agnostic=False)] == [(0, 6)] * 2
    assert [tuple(rows.shape) for rows in way(torch.zeros(2, 3, 6), 0.5, 9, agnostic=False)] == [(0, 6)] * 2


@pytest.mark.parametrize("limit", [0.0, 0.1, 0.3, 0.45, 0.5, 0.6, 0.7, 1.0])
def test_a_float32_is_above_the_limit_where_it_is_above_the_nearest_one_below(limit: float) -> None:
    around = torch.tensor(limit).nextafter(torch.tensor([-9.0, limit, 9.0]))
    assert [value > below(limit) for value in around.tolist()] == [value > limit for value in around.tolist()]
