"""Loaders: the same batches whatever the threads, resumed in mid-epoch, and clean ends."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from starling.config.hyp import Hyp
from starling.core.errors import ConfigError, DataError
from starling.data.augment.device_paint import DevicePainter
from starling.data.augment.letterbox import boxes_to_original
from starling.data.cache.store import ImageStore
from starling.data.dataset.dataset import Dataset, DatasetDescription
from starling.data.loader import prepare
from starling.data.loader.batching import Batching
from starling.data.loader.loader import Batch, TrainLoader, ValLoader
from starling.data.loader.prepare import PREFETCH

SIZE = 64


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    folder = tmp_path / "images"
    (tmp_path / "labels").mkdir()
    folder.mkdir()
    for number in range(11):
        hw = [(48, 96), (100, 100), (120, 60)][number % 3]
        pixels = np.random.default_rng(number).integers(0, 255, (*hw, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
        if number % 4:
            (tmp_path / "labels" / f"{number:02}.txt").write_text("1 .5 .5 .5 .5\n0 .25 .3 .2 .4\n")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [x, y]\n")
    return Dataset.load(DatasetDescription.from_yaml(tmp_path / "data.yaml"), "train")


def _train(dataset: Dataset, workers: int = 2, batch_size: int = 4) -> TrainLoader:
    return TrainLoader(
        dataset,
        ImageStore(dataset, SIZE),
        hyp=Hyp(),
        image_size=SIZE,
        batch_size=batch_size,
        seed=7,
        workers=workers,
    )


def _validate(dataset: Dataset, workers: int = 2, rect: bool = True) -> ValLoader:
    return ValLoader(
        dataset,
        ImageStore(dataset, SIZE),
        image_size=SIZE,
        batch_size=4,
        stride=32,
        rect=rect,
        workers=workers,
    )


def _same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        a.indices == b.indices and torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets)
        for a, b in zip(left, right, strict=True)
    )


def test_from_an_epoch_on_no_mosaics_are_shown(dataset: Dataset) -> None:
    closing, plain, single = (
        TrainLoader(
            dataset,
            ImageStore(dataset, SIZE),
            hyp=Hyp(mosaic=mosaic),
            image_size=SIZE,
            batch_size=4,
            seed=7,
            workers=0,
            mosaics_end=end,
        )
        for mosaic, end in ((1.0, 2), (1.0, None), (0.0, None))
    )
    for epoch in range(4):
        shown = list(closing.epoch(epoch))
        assert _same(shown, list((plain if epoch < 2 else single).epoch(epoch)))
        assert not _same(shown, list((single if epoch < 2 else plain).epoch(epoch)))


def test_an_epoch_visits_every_image_once_and_keeps_the_partial_batch(dataset: Dataset) -> None:
    loader = _train(dataset)
    batches = list(loader.epoch(0))
    assert len(loader) == len(batches) == 3
    assert sorted(i for batch in batches for i in batch.indices) == list(range(11))
    assert batches[-1].images.shape == (3, 3, SIZE, SIZE)
    for batch in batches:
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.targets.shape[1] == 6
        assert batch.targets[:, 0].max() < len(batch.indices)
        assert len(batch.original_hw) == len(batch.indices)


def test_any_number_of_workers_gives_the_same_batches(dataset: Dataset) -> None:
    alone = list(_train(dataset, workers=0).epoch(1))
    for workers in (1, 2, 5):
        assert _same(alone, list(_train(dataset, workers=workers).epoch(1)))
    assert not _same(alone, list(_train(dataset, workers=0).epoch(2)))


def test_an_epoch_started_late_equals_the_tail_of_the_whole(dataset: Dataset) -> None:
    whole = list(_train(dataset, batch_size=2).epoch(3))
    for start in (1, 4, len(whole)):
        assert _same(whole[start:], list(_train(dataset, batch_size=2).epoch(3, start=start)))


def test_an_abandoned_epoch_ends_its_threads(dataset: Dataset) -> None:
    before = threading.active_count()
    batches = _train(dataset, workers=3, batch_size=1).epoch(0)
    next(batches)
    assert threading.active_count() > before
    del batches
    assert threading.active_count() == before


def test_an_error_in_a_thread_is_raised_where_the_batch_is_asked_for(dataset: Dataset) -> None:
    loader = _train(dataset)
    dataset.images[5].write_bytes(b"gone")
    before = threading.active_count()
    with pytest.raises(DataError, match=r"05\.png"):
        list(loader.epoch(0))
    assert threading.active_count() == before


def test_only_a_few_batches_are_prepared_ahead(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    allocated: list[int] = []
    allocate = prepare._allocate
    monkeypatch.setattr(prepare, "_allocate", lambda *args: allocated.append(1) or allocate(*args))
    batches = _train(dataset, batch_size=1).epoch(0)
    next(batches)
    assert len(allocated) == PREFETCH + 1
    batches.close()  # type: ignore[attr-defined]


def test_validation_shapes_fit_each_batch_of_like_aspect(dataset: Dataset) -> None:
    batches = list(_validate(dataset))
    aspects = [h / w for batch in batches for h, w in batch.original_hw]
    assert aspects == sorted(aspects)
    assert sorted(i for batch in batches for i in batch.indices) == list(range(11))
    # Side 64 is 2 strides: flat 1 x 2, square 2 x 2, tall 2 x 1, each plus half a stride, rounded up.
    assert [tuple(batch.images.shape[2:]) for batch in batches] == [(64, 96), (96, 96), (96, 64)]


@pytest.mark.parametrize("rect", [True, False])
def test_validation_targets_map_back_to_the_labels(dataset: Dataset, rect: bool) -> None:
    for batch in _validate(dataset, rect=rect):
        assert batch.geometry is not None
        height, width = batch.images.shape[2:]
        for position, index in enumerate(batch.indices):
            rows = batch.targets[batch.targets[:, 0] == position]
            centre, half = rows[:, 2:4], rows[:, 4:6] / 2
            boxes = torch.cat((centre - half, centre + half), 1) * torch.tensor([width, height] * 2)
            original_h, original_w = batch.original_hw[position]
            back = boxes_to_original(boxes, batch.geometry[position], (original_h, original_w))
            truth = dataset.labels[index]
            corners = np.concatenate(
                (truth[:, 1:3] - truth[:, 3:5] / 2, truth[:, 1:3] + truth[:, 3:5] / 2), 1
            )
            expected = corners * np.array([original_w, original_h, original_w, original_h])
            assert np.allclose(back.numpy(), expected, atol=0.01)


def test_validation_is_the_same_each_time_and_for_any_workers(dataset: Dataset) -> None:
    loader = _validate(dataset)
    assert _same(list(loader), list(loader))
    assert _same(list(loader), list(_validate(dataset, workers=0)))


def test_settings_that_cannot_work_are_refused(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        _train(dataset, batch_size=0)
    with pytest.raises(ConfigError, match="workers"):
        _train(dataset, workers=-1)
    with pytest.raises(ConfigError, match="store holds images of 32"):
        TrainLoader(
            dataset, ImageStore(dataset, 32), hyp=Hyp(), image_size=64, batch_size=1, seed=0, workers=0
        )


@pytest.mark.parametrize("quad", [False, True], ids=["images", "quad"])
def test_batches_painted_on_the_device_are_those_painted_in_threads(dataset: Dataset, quad: bool) -> None:
    store = ImageStore(dataset, SIZE)

    def batches(painter: DevicePainter | None) -> list[Batch]:
        loader = TrainLoader(
            dataset, store, hyp=Hyp(degrees=5.0, mixup=0.5), image_size=SIZE, batch_size=4, seed=7, workers=2,
            batching=Batching(quad=quad), painter=painter,
        )  # fmt: skip
        return list(loader.epoch(2))

    painter = DevicePainter.from_store(store, torch.device("cpu"), dtype=torch.float32)
    for painted, expected in zip(batches(painter), batches(None), strict=True):
        assert torch.equal(painted.targets, expected.targets)
        assert painted.indices == expected.indices
        assert painted.images.dtype == torch.float32
        assert painted.images.is_contiguous(memory_format=torch.channels_last)
        assert (painted.images - expected.images / 255).abs().mean() < 1 / 255


def test_letterboxes_painted_on_the_device_are_those_of_validation(dataset: Dataset) -> None:
    store = ImageStore(dataset, SIZE)
    painter = DevicePainter.from_store(store, torch.device("cpu"))

    def batches(chosen: DevicePainter | None) -> list[Batch]:
        return list(
            ValLoader(dataset, store, image_size=SIZE, batch_size=4, stride=32, workers=1, painter=chosen)
        )

    for painted, expected in zip(batches(painter), batches(None), strict=True):
        assert torch.equal(painted.targets, expected.targets)
        assert painted.geometry == expected.geometry
        assert painted.images.shape == expected.images.shape
        assert (painted.images.float() - expected.images).abs().mean() < 1


def test_an_epoch_begins_before_its_first_batch_is_asked_for_and_ends_when_it_is_dropped(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()
    allocate = prepare._allocate
    monkeypatch.setattr(prepare, "_allocate", lambda *args: begun.set() or allocate(*args))
    batches = _train(dataset).epoch(0)
    assert begun.is_set()
    assert [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
    del batches
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
