"""Augmentation: labels follow pixels, the unpainted canvas equals a painted one, and nothing is left to chance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from starling.config.hyp import Hyp
from starling.data.augment import paint, plan
from starling.data.augment.item_labels import labels_in_view
from starling.data.augment.letterbox import apply_letterbox, letterbox_geometry
from starling.data.augment.outlines import choose_pastes, cut
from starling.data.augment.plan import QuadPlan, plan_item, plan_letterbox
from starling.data.augment.streams import epoch_order, random_stream
from tests.unit.data.augment_cases import CASES, SHAPES, SIDE, Sources, textured, training_item

GOLDEN = Path(__file__).with_name("augment_golden.npz")
"""Every fourth pixel each way, and the labels, of two items a case; made before plans and painting were parted."""
PLAIN = Hyp(hsv_h=0.0, hsv_s=0.0, hsv_v=0.0, fliplr=0.0, translate=0.1, scale=0.3)
ROTATED = replace(PLAIN, degrees=25.0, shear=8.0)
TILTED = replace(ROTATED, perspective=0.001)


def _squares() -> tuple[Any, Sources]:
    """Return images with one white square each on black, and labels that frame it exactly."""
    store, labels = Sources(), []
    for number, (height, width) in enumerate(SHAPES):
        image = np.zeros((height, width, 3), np.uint8)
        top, left, side = 12 + 3 * number, 9 + 5 * number, 20
        image[top : top + side, left : left + side] = 255
        store.append(image)
        box = ((left + side / 2) / width, (top + side / 2) / height, side / width, side / height)
        labels.append(np.array([[number, *box]], np.float32))
    return SimpleNamespace(
        images=[Path(str(i)) for i in range(len(SHAPES))], labels=labels, polygons=[]
    ), store


def _item(hyp: Hyp, index: int = 0, epoch: int = 0, seed: int = 5, side: int = SIDE) -> tuple[Any, Any]:
    dataset, store = _squares()
    return training_item(dataset, store, hyp, side, seed=seed, epoch=epoch, index=index)


@pytest.mark.parametrize("flips", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("mosaic", [0.0, 1.0])
@pytest.mark.parametrize("base", [PLAIN, ROTATED, TILTED], ids=["aligned", "affine", "perspective"])
def test_each_label_frames_its_white_square(base: Hyp, mosaic: float, flips: tuple[float, float]) -> None:
    hyp = replace(base, mosaic=mosaic, fliplr=flips[0], flipud=flips[1])
    framed = 0
    for index in range(len(SHAPES)):
        for epoch in range(6):
            image, labels = _item(hyp, index, epoch)
            count, _, stats, _ = cv2.connectedComponentsWithStats((image[..., 0] > 180).astype(np.uint8))
            blobs = [
                (x, y, x + w, y + h)
                for x, y, w, h, area in stats[1:count].tolist()
                if w > 5 and h > 5 and area
            ]
            centre, half = labels[:, 1:3] * SIDE, labels[:, 3:5] * SIDE / 2
            boxes = np.concatenate((centre - half, centre + half), 1)
            inside = [b for b in boxes if b[:2].min() > 3 and b[2:].max() < SIDE - 3]
            for box in inside:
                nearest = min(np.abs(np.subtract(blob, box)).max() for blob in blobs)
                assert nearest <= 2.0, (index, epoch, box, blobs)
                framed += 1
    assert framed >= 8


def test_an_unpainted_canvas_gives_the_image_that_a_painted_one_does() -> None:
    rng = np.random.default_rng(0)
    store = Sources()
    for height, width in SHAPES:
        coarse = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        store.append(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))
    dataset, _ = _squares()
    for hyp in (PLAIN, ROTATED, TILTED):
        out, _ = training_item(dataset, store, hyp, SIDE, seed=3, epoch=1, index=2)
        draws = random_stream(3, 1, 2).random(plan._DRAWS).tolist()
        view = plan._mosaic(store.shapes_hw, hyp, SIDE, draws, 2)
        canvas = np.full((2 * SIDE, 2 * SIDE, 3), 114, np.uint8)
        for tile in view.tiles:
            image = store[tile.image]
            for y in range(image.shape[0]):
                for x in range(image.shape[1]):
                    cx, cy = tile.x + x, tile.y + y
                    if 0 <= cx < 2 * SIDE and 0 <= cy < 2 * SIDE:
                        canvas[cy, cx] = image[y, x]
        matrix = paint._HALF_BACK @ view.matrix @ paint._HALF
        painted = cv2.warpPerspective(canvas, matrix, (SIDE, SIDE), borderValue=(114, 114, 114))
        difference = np.abs(out.astype(int) - painted).max(2)
        # Only the outlines of the tiles may differ, where the painted canvas blends neighbours.
        assert (difference > 4).mean() < 0.06
        assert np.median(difference) <= 1


@pytest.mark.parametrize("hyp", [Hyp(), Hyp(degrees=10.0), Hyp(mosaic=0.0), Hyp(mixup=1.0)])
def test_the_same_key_gives_the_same_bytes_and_another_key_others(hyp: Hyp) -> None:
    image, labels = _item(hyp, 1, 2, 3)
    again, labels_again = _item(hyp, 1, 2, 3)
    assert np.array_equal(image, again)
    assert np.array_equal(labels, labels_again)
    for index, epoch, seed in ((0, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not np.array_equal(image, _item(hyp, index, epoch, seed)[0])


def test_labels_lie_within_the_frame_and_keep_large_class_numbers() -> None:
    dataset, store = _squares()
    wide = np.array([[900, 0.5, 0.5, 1.0, 1.0], [900, 0.1, 0.1, 0.3, 0.3]], np.float32)
    dataset.labels = [wide] * len(SHAPES)
    hyp = Hyp(degrees=15.0, scale=0.9, translate=0.4, mixup=0.5)
    for epoch in range(40):
        for candidate in (hyp, replace(hyp, degrees=0.0)):
            _, labels = training_item(dataset, store, candidate, SIDE, seed=1, epoch=epoch, index=0)
            half = labels[:, 3:5] / 2
            assert (labels[:, 1:3] - half >= -1e-6).all()
            assert (labels[:, 1:3] + half <= 1 + 1e-6).all()
            assert (labels[:, 3:5] * SIDE > 2).all()
            assert (labels[:, 0] == 900).all()
            assert labels.dtype == np.float32


def test_a_box_hardly_in_view_is_dropped() -> None:
    boxes = np.array([[0, -1, 10, 50, 50], [0, -46, 10, 4, 50], [0, 10, 10, 11.5, 50], [0, 0, 0, 90, 0.5]])
    labels = labels_in_view(boxes.astype(np.float32), np.eye(3), True, 1.0, (SIDE, SIDE))
    assert len(labels) == 1
    assert np.allclose(labels[0, 1:] * SIDE, [25, 30, 50, 40])


def test_without_mosaic_and_motion_the_image_is_centred_on_grey() -> None:
    still = replace(PLAIN, mosaic=0.0, translate=0.0, scale=0.0)
    image, labels = _item(still, 3)
    assert np.array_equal(image[24:72], _squares()[1][3])
    assert (image[:24] == 114).all()
    assert (image[72:] == 114).all()
    assert len(labels) == 1


def test_colour_jitter_changes_colours_and_not_their_places() -> None:
    flat = np.full((8, 8, 3), (200, 90, 40), np.uint8)
    grey = np.full((8, 8, 3), 120, np.uint8)
    dataset = SimpleNamespace(images=[Path("a")], labels=[np.zeros((0, 5), np.float32)], polygons=[])
    still = Hyp(mosaic=0.0, translate=0.0, scale=0.0, fliplr=0.0)
    coloured, _ = training_item(dataset, Sources([flat]), still, 8, seed=1, epoch=0, index=0)
    assert len(np.unique(coloured.reshape(-1, 3), axis=0)) == 1
    assert not np.array_equal(coloured, flat)
    shaded, _ = training_item(dataset, Sources([grey]), still, 8, seed=1, epoch=0, index=0)
    assert len(np.unique(shaded)) == 1  # grey stays grey, lighter or darker


def test_mixup_adds_the_labels_of_a_second_mosaic() -> None:
    more = sum(len(_item(replace(PLAIN, mixup=1.0), 0, epoch)[1]) for epoch in range(10))
    assert more > 1.5 * sum(len(_item(PLAIN, 0, epoch)[1]) for epoch in range(10))


def test_a_dataset_of_background_only_gives_no_labels() -> None:
    dataset, store = _squares()
    dataset.labels = [np.zeros((0, 5), np.float32)] * len(SHAPES)
    _, labels = training_item(dataset, store, Hyp(mixup=1.0), SIDE, seed=1, epoch=0, index=0)
    assert labels.shape == (0, 5)


def test_an_epochs_order_is_a_permutation_that_changes_with_epoch_and_seed() -> None:
    order = epoch_order(1, 0, 50)
    assert sorted(order.tolist()) == list(range(50))
    assert np.array_equal(order, epoch_order(1, 0, 50))
    assert not np.array_equal(order, epoch_order(1, 1, 50))
    assert not np.array_equal(order, epoch_order(2, 0, 50))


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_a_flip_is_the_exact_mirror(mosaic: float) -> None:
    hyp = replace(PLAIN, mosaic=mosaic, scale=0.0, translate=0.0)
    image, labels = _item(hyp, 1)
    mirrored, labels_mirrored = _item(replace(hyp, fliplr=1.0), 1)
    upended, _ = _item(replace(hyp, flipud=1.0), 1)
    assert np.array_equal(mirrored, image[:, ::-1])
    assert np.array_equal(upended, image[::-1])
    assert np.allclose(labels_mirrored[:, 1], 1 - labels[:, 1], atol=1e-5)


def test_the_canvas_centre_lands_within_the_translation_whatever_else_moves() -> None:
    hyp = Hyp(degrees=40.0, shear=10.0, scale=0.5, perspective=0.001, translate=0.2)
    landings = []
    for epoch in range(200):
        draws = random_stream(0, epoch, 0).random(plan._DRAWS).tolist()
        matrix, _ = plan._canvas_matrix(hyp, draws, (2 * SIDE, 2 * SIDE), (SIDE, SIDE))
        x, y, w = matrix @ (SIDE, SIDE, 1)
        landings.append((x / w / SIDE, y / w / SIDE))
    low, high = np.min(landings, 0), np.max(landings, 0)
    assert ((low >= 0.3) & (low < 0.32)).all()
    assert ((high <= 0.7) & (high > 0.68)).all()


@pytest.mark.parametrize("name", ["mosaic", "mixup", "copy-paste"])
def test_an_item_fetches_each_image_that_it_shows_once_and_no_other(name: str) -> None:
    dataset, store = textured()
    hyp, hw = CASES[name]

    class Counting:
        shapes_hw = store.shapes_hw

        def __getitem__(self, index: int) -> np.ndarray:
            fetched.append(index)
            return store[index]

    for index in range(len(SHAPES)):
        fetched: list[int] = []
        training_item(dataset, Counting(), hyp, hw, seed=1, epoch=0, index=index)
        item = plan_item(dataset, store.shapes_hw, hyp, hw, seed=1, epoch=0, index=index)
        assert sorted(fetched) == sorted({sample.image for layer in item.layers for sample in layer})
        assert fetched


@pytest.mark.parametrize("name", CASES)
def test_items_stay_as_they_were(name: str) -> None:
    dataset, store = textured()
    hyp, hw = CASES[name]
    with np.load(GOLDEN) as golden:
        for index in (0, 3):
            image, labels = training_item(dataset, store, hyp, hw, seed=11, epoch=index + 1, index=index)
            assert np.allclose(labels, golden[f"{name}, {index}, labels"], rtol=0, atol=1e-6)
            # Other processors may round other pixels by a step; a tile moved by a tenth of a pixel is seen.
            before = golden[f"{name}, {index}, picture"].astype(int)
            assert np.abs(image[::4, ::4] - before).mean() < 0.05


def test_a_letterbox_plan_shows_what_a_resized_and_padded_image_does() -> None:
    dataset, store = textured()
    for index, (height, width) in enumerate(SHAPES):
        geometry = letterbox_geometry((height, width), (64, 80), minimal=False)
        labels = dataset.labels[index]
        item = plan_letterbox(index, (height, width), geometry, labels)
        image = np.empty((64, 80, 3), np.uint8)
        paint.paint_item(item, store, image)
        difference = np.abs(image.astype(int) - apply_letterbox(store[index], geometry))
        assert difference.mean() < 0.5
        centre, size = labels[:, 1:3] * (width, height), labels[:, 3:5] * (width, height)
        assert np.allclose(
            item.labels[:, 1:3] * (80, 64), centre * geometry.ratio + geometry.pad_wh, atol=0.5
        )
        assert np.allclose(item.labels[:, 3:5] * (80, 64), size * geometry.ratio, atol=0.5)


def test_four_items_side_by_side_keep_their_labels_in_their_quarters() -> None:
    dataset, store = textured()
    hyp, hw = CASES["mosaic"]
    items = tuple(
        plan_item(dataset, store.shapes_hw, hyp, hw, seed=1, epoch=0, index=index) for index in range(3)
    )
    labels = QuadPlan(items=items, enlarged=False).labels
    corners = np.repeat([(0, 0), (0.5, 0), (0, 0.5)], [len(item.labels) for item in items], 0)
    own = np.concatenate([item.labels for item in items])
    assert np.array_equal(labels[:, 0], own[:, 0])
    assert np.allclose(labels[:, 1:3], own[:, 1:3] / 2 + corners)
    assert np.allclose(labels[:, 3:], own[:, 3:] / 2)
    assert np.array_equal(QuadPlan(items=items, enlarged=True).labels, items[0].labels)


def _triangles(labelled: bool = True) -> tuple[Any, Sources]:
    """Return a black image with one white triangle in its left half, and labels that outline it."""
    corners = np.array([[0.1, 0.2], [0.4, 0.5], [0.15, 0.8]], np.float32)
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    cv2.fillPoly(image, [np.rint(corners * SIDE).astype(np.int32)], (255, 255, 255))
    low, high = corners.min(0), corners.max(0)
    rows = np.array([[3, *((low + high) / 2), *(high - low)]], np.float32)
    dataset = SimpleNamespace(
        images=[Path("a")] * 4, labels=[rows] * 4, polygons=[(corners,)] * 4 if labelled else []
    )
    return dataset, Sources([image] * 4)


def _blobs(image: np.ndarray) -> list[tuple[int, int, int, int]]:
    count, _, stats, _ = cv2.connectedComponentsWithStats((image[..., 0] > 180).astype(np.uint8))
    return [(x, y, x + w, y + h) for x, y, w, h, _ in stats[1:count].tolist()]


@pytest.mark.parametrize("base", [PLAIN, ROTATED, TILTED], ids=["aligned", "affine", "perspective"])
def test_a_label_with_a_polygon_frames_what_is_seen_of_it_after_any_turn(base: Hyp) -> None:
    dataset, store = _triangles()
    for epoch in range(20):
        image, labels = training_item(
            dataset, store, replace(base, mosaic=0.0), SIDE, seed=1, epoch=epoch, index=0
        )
        centre, half = labels[:, 1:3] * SIDE, labels[:, 3:5] * SIDE / 2
        (box,) = np.concatenate((centre - half, centre + half), 1)
        nearest = min(np.abs(np.subtract(blob, box)).max() for blob in _blobs(image))
        assert nearest <= 2.5, (epoch, box, _blobs(image))


@pytest.mark.parametrize("base", [PLAIN, ROTATED, TILTED], ids=["aligned", "affine", "perspective"])
def test_copy_paste_paints_mirrored_objects_and_labels_each_where_it_is(base: Hyp) -> None:
    dataset, store = _triangles()
    plain = pasted = 0
    for epoch in range(20):
        image, labels = training_item(
            dataset, store, replace(base, copy_paste=1.0), SIDE, seed=1, epoch=epoch, index=0
        )
        _, before = training_item(dataset, store, base, SIDE, seed=1, epoch=epoch, index=0)
        plain, pasted = plain + len(before), pasted + len(labels)
        assert (labels[:, 0] == 3).all()
        centre, half = labels[:, 1:3] * SIDE, labels[:, 3:5] * SIDE / 2
        for blob in _blobs(image):  # touching objects are one blob: their labels lie within it
            if (blob[2] - blob[0]) * (blob[3] - blob[1]) < 40:
                continue
            assert (
                ((centre > (blob[0] - 3, blob[1] - 3)) & (centre < (blob[2] + 3, blob[3] + 3))).all(1).any()
            )
        for x, y in centre[(half > 6).all(1)].round().astype(int):
            assert image[max(y - 6, 0) : y + 6, max(x - 6, 0) : x + 6, 0].max() > 180
    assert pasted > 1.3 * plain


def test_copy_paste_without_polygons_changes_nothing() -> None:
    dataset, store = _triangles(labelled=False)
    for hyp in (PLAIN, ROTATED):
        image, labels = training_item(dataset, store, hyp, SIDE, seed=1, epoch=0, index=0)
        again, labels_again = training_item(
            dataset, store, replace(hyp, copy_paste=1.0), SIDE, seed=1, epoch=0, index=0
        )
        assert np.array_equal(image, again)
        assert np.array_equal(labels, labels_again)


def test_no_paste_hides_three_tenths_of_an_object() -> None:
    outline = np.array([[0, 0], [10, 0], [10, 10]], float)
    boxes = np.array([[0, 0, 10, 10], [92, 0, 102, 10], [0, 40, 10, 50]], np.float32)
    stream = random_stream(0, 0, 0)
    chosen = choose_pastes(boxes, [outline, None, outline], 1.0, 100, stream)
    # The first lands on 90..100 and would hide .8 of the second; the third lands on nothing.
    assert [(index, box.tolist()) for index, box in chosen] == [(2, [90, 40, 100, 50])]
    assert not choose_pastes(boxes, [outline, None, outline], 0.0, 100, stream)


def test_a_sliver_is_kept_where_a_polygon_tells_and_dropped_where_only_a_box_does() -> None:
    box = np.array([[0, -95, 10, 5, 60]], np.float32)
    outline = np.array([[-95, 10], [5, 10], [5, 60], [-95, 60]], float)
    assert len(labels_in_view(box, np.eye(3), True, 1.0, (SIDE, SIDE), [outline])) == 1
    assert len(labels_in_view(box, np.eye(3), True, 1.0, (SIDE, SIDE))) == 0


def test_a_polygon_is_cut_at_the_frame_exactly() -> None:
    triangle = np.array([[-10, 5], [10, 5], [10, 25]], float)
    part = cut(triangle, (20, 20))
    assert part.min(0).tolist() == [0, 5]
    assert part.max(0).tolist() == [10, 20]
    assert len(cut(triangle - 100, (20, 20))) == 0
    assert np.array_equal(cut(triangle + 20, (60, 60)), triangle + 20)


def test_an_image_shown_again_in_an_epoch_looks_different() -> None:
    dataset, store = _squares()
    first, again = (
        training_item(dataset, store, Hyp(), SIDE, seed=1, epoch=0, index=0, repeat=repeat)[0]
        for repeat in (0, 1)
    )
    assert not np.array_equal(first, again)


def test_a_rectangle_is_filled_without_a_mosaic() -> None:
    still = replace(PLAIN, mosaic=0.0, translate=0.0, scale=0.0)
    dataset, store = _squares()
    image, labels = training_item(dataset, store, still, (48, 96), seed=1, epoch=0, index=3)
    assert np.array_equal(image, store[3])
    assert np.allclose(labels, dataset.labels[3], atol=1e-6)
    mirrored, _ = training_item(
        dataset, store, replace(still, fliplr=1.0, flipud=1.0), (48, 96), seed=1, epoch=0, index=3
    )
    assert np.array_equal(mirrored, image[::-1, ::-1])
