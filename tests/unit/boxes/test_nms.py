"""Both ways of suppression keep exactly what torchvision keeps of each class, however the work is cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor

from starling.boxes.geometry import xywh_to_xyxy, xyxy_to_xywh
from starling.boxes.nms import device, host, non_max_suppression
from starling.boxes.nms.rules import Rules, below

Way = Callable[[Tensor, Rules], list[Tensor]]
Suppression = Callable[..., list[Tensor]]
both_ways = pytest.mark.parametrize("way", [host.suppress, device.suppress], ids=["host", "device"])


@pytest.fixture(params=["host", "device"])
def nms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Suppression:
    """Return `non_max_suppression`, which takes either way on the tensors of a CPU."""
    if request.param == "device":
        monkeypatch.setattr(host, "suppress", device.suppress)
    return non_max_suppression


def random_predictions(count: int, nc: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([300.0, 300, 60, 60] + [1.0] * (1 + nc))
    return torch.rand(1, count, 5 + nc, generator=generator) * scale


def crowd(count: int, seed: int, classes: int = 3, spread: float = 120) -> Tensor:
    """Return [count,6] candidates, many on each other, in falling order of confidence with equal ones among them.

    Corners lie on a grid, so that nothing is rounded on the way through centres and sizes.
    """
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * spread
    boxes = torch.cat((low, low + 10 + torch.rand(count, 2, generator=generator) * 40), dim=1).mul(64).round()
    confidence = torch.rand(count, 1, generator=generator).mul(50).ceil().div(50).sort(0, descending=True)[0]
    label = torch.randint(classes, (count, 1), generator=generator).float()
    return torch.cat((boxes / 64, confidence, label), dim=1)


def predicted(candidates: Tensor, classes: int = 3) -> Tensor:
    """Return the predictions [n,5+classes] that have these candidates and no others."""
    scores = torch.nn.functional.one_hot(candidates[:, 5].long(), classes) * candidates[:, 4:5]
    return torch.cat((xyxy_to_xywh(candidates[:, :4]), torch.ones(len(candidates), 1), scores), dim=1)


def together(images: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([predicted(image) for image in images], batch_first=True)


def rules(iou: float, limit: int, agnostic: bool = False, **changes: object) -> Rules:
    values = {
        "conf": 0.001,
        "iou": iou,
        "classes": None,
        "agnostic": agnostic,
        "multi_label": True,
        "limit": limit,
    }
    return Rules(**{**values, **changes})  # type: ignore[arg-type]


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
        found = way(together(images), rules(iou, limit, agnostic))
        for rows, image in zip(found, images, strict=True):
            assert torch.equal(rows, by_torchvision(image, iou, limit, agnostic))


@both_ways
def test_small_heads_blocks_and_strides_change_nothing(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    image = predicted(crowd(400, 6))[None]
    whole = way(image, rules(0.5, 300))[0]
    for module, name, size in ((host, "HEAD", 37), (device, "FIRST_HEAD", 37), (device, "BLOCK", 7)):
        monkeypatch.setattr(module, name, size)
    assert torch.equal(way(image, rules(0.5, 300))[0], whole)


def test_an_image_gives_the_same_on_one_thread_and_on_many() -> None:
    images = together([crowd(300, seed) for seed in range(5)])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = host.suppress(images, rules(0.5, 100))
        torch.set_num_threads(3)
        assert all(
            torch.equal(a, b) for a, b in zip(host.suppress(images, rules(0.5, 100)), alone, strict=True)
        )
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("classes", [None, (0, 2), ()])
def test_both_ways_find_the_same_in_random_predictions(
    multi_label: bool, classes: tuple[int, ...] | None
) -> None:
    predictions = torch.rand(3, 500, 8, generator=torch.Generator().manual_seed(8))
    predictions[..., :4] *= 60
    predictions[0, :, 5:] = predictions[0, :, 5:].mul(4).round().div(4)  # classes of equal score
    asked = rules(0.5, 100, multi_label=multi_label, classes=classes, conf=0.2)
    found = host.suppress(predictions, asked)
    assert [len(rows) > 0 for rows in found] == [classes != ()] * 3
    assert all(torch.equal(a, b) for a, b in zip(found, device.suppress(predictions, asked), strict=True))


@both_ways
def test_of_a_long_row_in_which_each_overlaps_the_next_every_second_stays(way: Way) -> None:
    image = torch.tensor([[3.0 * i, 0, 3.0 * i + 10, 10, 1 - i / 1000, 0] for i in range(200)])
    assert torch.equal(way(predicted(image)[None], rules(0.5, 300))[0], image[::2])


@both_ways
@pytest.mark.parametrize("iou", [0.5, 0.6, 0.7, 0.8])
def test_an_overlap_at_the_limit_is_judged_as_torchvision_judges_it(way: Way, iou: float) -> None:
    boxes = [[0.0, 0, 10, 10], [0.0, 0, 10, round(10 * iou)]]
    image = torch.tensor([[*box, 0.9 - i / 10, 0] for i, box in enumerate(boxes)])
    assert torch.equal(way(predicted(image)[None], rules(iou, 9))[0], by_torchvision(image, iou, 9))


@both_ways
def test_boxes_without_area_all_stay(way: Way) -> None:
    image = torch.tensor([[5.0, 5, 5, 5, 0.9, 0], [5.0, 5, 5, 5, 0.8, 0], [0.0, 0, 9, 9, 0.7, 0]])
    assert torch.equal(way(predicted(image)[None], rules(0.0, 9))[0], image)


@both_ways
def test_no_candidates_leave_nothing(way: Way) -> None:
    assert [tuple(rows.shape) for rows in way(torch.zeros(2, 0, 8), rules(0.5, 9))] == [(0, 6)] * 2
    assert [tuple(rows.shape) for rows in way(torch.zeros(2, 3, 8), rules(0.5, 9))] == [(0, 6)] * 2


@pytest.mark.parametrize("limit", [0.0, 0.1, 0.3, 0.45, 0.5, 0.6, 0.7, 1.0])
def test_a_float32_is_above_the_limit_where_it_is_above_the_nearest_one_below(limit: float) -> None:
    around = torch.tensor(limit).nextafter(torch.tensor([-9.0, limit, 9.0]))
    assert [value > below(limit) for value in around.tolist()] == [value > limit for value in around.tolist()]


def test_suppression_of_a_growing_head_equals_suppression_of_all(
    nms: Suppression, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictions = torch.cat([random_predictions(500, nc=3, seed=seed) for seed in range(3)])
    predictions[1, :, 4] *= 0.0012  # few candidates: this line is short
    whole = nms(predictions, 0.001, 0.3, multi_label=True, max_detections=200)
    monkeypatch.setattr(host, "HEAD", 40)
    monkeypatch.setattr(device, "FIRST_HEAD", 40)
    cut = nms(predictions, 0.001, 0.3, multi_label=True, max_detections=200)
    assert len(whole[0]) == 200
    assert 0 < len(whole[1]) < 200
    assert all(torch.equal(a, b) for a, b in zip(cut, whole, strict=True))


def test_images_of_a_batch_do_not_touch_each_other(nms: Suppression, monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = torch.cat([random_predictions(200, nc=2, seed=seed) for seed in range(5)])
    alone = [nms(image[None], 0.1, 0.4, multi_label=True)[0] for image in predictions]
    for together in (2, 32):
        monkeypatch.setattr(device, "IMAGES_TOGETHER", together)
        found = nms(predictions, 0.1, 0.4, multi_label=True)
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


@pytest.mark.parametrize("head", [7, 2048])
def test_equal_confidences_keep_the_order_of_the_predictions(
    nms: Suppression, head: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "HEAD", head)
    monkeypatch.setattr(device, "FIRST_HEAD", head)
    predictions = torch.tensor([[20.0 * i, 10, 10, 10, 0.5, 0.5, 0.5] for i in range(30)])[None]
    found = nms(predictions, 0.1, 0.5, multi_label=True)[0]
    assert found[:, 0].tolist() == [20.0 * i - 5 for i in range(30) for _ in range(2)]
    assert found[:, 5].tolist() == [0, 1] * 30
    best = nms(predictions, 0.1, 0.5, max_detections=4)[0]
    assert best[:, 0].tolist() == [-5, 15, 35, 55]
    assert best[:, 5].tolist() == [0] * 4


def test_predictions_that_are_no_numbers_are_no_candidates(nms: Suppression) -> None:
    predictions = random_predictions(50, nc=2)
    predictions[0, ::2, 4] = torch.nan
    found = nms(predictions, 0.01, 0.99, multi_label=True)[0]
    assert torch.equal(found, nms(predictions[:, 1::2], 0.01, 0.99, multi_label=True)[0])


def test_predictions_are_left_as_they_are(nms: Suppression) -> None:
    predictions = random_predictions(50, nc=2)
    before = predictions.clone()
    nms(predictions, 0.3, classes=[1], multi_label=True)
    assert torch.equal(predictions, before)


def test_suppression_agrees_with_torchvision_class_by_class(nms: Suppression) -> None:
    predictions = random_predictions(400, nc=2)
    found = nms(predictions, 0.3, 0.5, max_detections=1000)[0]
    rows = predictions[0]
    confidence, label = (rows[:, 5:] * rows[:, 4:5]).max(1)
    keep = (confidence > 0.3) & (rows[:, 4] > 0.3)
    corners = xywh_to_xyxy(rows[keep, :4])
    expected = torchvision.ops.batched_nms(corners, confidence[keep], label[keep], 0.5)
    assert torch.equal(found[:, :4], corners[expected])


def test_only_the_most_confident_candidates_are_looked_at(
    nms: Suppression, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictions = random_predictions(300, nc=1)
    every = nms(predictions, 0.01, 0.99, max_detections=300)[0]
    monkeypatch.setattr(host, "MAX_CANDIDATES", 20)
    monkeypatch.setattr(device, "MAX_CANDIDATES", 20)
    few = nms(predictions, 0.01, 0.99, max_detections=300)[0]
    assert len(few) <= 20
    assert torch.equal(few, every[: len(few)])


def test_nothing_above_the_threshold_gives_empty_detections(nms: Suppression) -> None:
    predictions = torch.zeros(2, 10, 8)
    for multi_label in (False, True):
        found = nms(predictions, multi_label=multi_label)
        assert [tuple(f.shape) for f in found] == [(0, 6), (0, 6)]


def test_overlapping_boxes_of_two_classes_stay_unless_agnostic(nms: Suppression) -> None:
    row = torch.tensor([[50.0, 50, 20, 20, 1, 0.9, 0.0], [50.0, 50, 20, 20, 1, 0.0, 0.8]])
    assert len(nms(row[None])[0]) == 2
    assert nms(row[None], agnostic=True)[0][:, 5].tolist() == [0]
    assert nms(row[None], classes=[1])[0][:, 5].tolist() == [1]
