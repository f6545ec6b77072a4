"""Rect, quad, image weights, multi-scale: what each shows, and that only seed, position and mAP decide."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from starling import settings
from starling.cli import train
from starling.config.hyp import Hyp
from starling.core.errors import ConfigError
from starling.core.settings.train import TrainConfig
from starling.data.cache.store import ImageStore
from starling.data.dataset.dataset import Dataset, DatasetDescription
from starling.data.loader.batching import Batching, BatchPlan, image_weights, plan_epoch
from starling.data.loader.loader import Batch, TrainLoader
from starling.device import Compute
from starling.model.checkpoint import load_checkpoint
from starling.prediction.predictor import to_input
from starling.training.setup.data import load_data
from starling.training.training import warn_of_idle
from tests.conftest import REPOSITORY

SIZE = 64
STILL = Hyp(mosaic=0.0, hsv_h=0.0, hsv_s=0.0, hsv_v=0.0, fliplr=0.0, translate=0.0, scale=0.0)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    folder = tmp_path / "images"
    (tmp_path / "labels").mkdir()
    folder.mkdir()
    for number in range(16):
        hw = [(32, 64), (64, 64), (64, 32)][number % 3]
        Image.new("RGB", hw[::-1], (16 * number, 100, 50)).save(folder / f"{number:02}.png")
        rows = "1 .5 .5 .5 .5\n" if number == 3 else "" if number == 4 else "0 .25 .5 .5 .5\n"
        (tmp_path / "labels" / f"{number:02}.txt").write_text(rows)
    (tmp_path / "data.yaml").write_text("train: images\nnames: [x, y]\n")
    return Dataset.load(DatasetDescription.from_yaml(tmp_path / "data.yaml"), "train")


def _plan(
    dataset: Dataset, batching: Batching, epoch: int = 0, seed: int = 1, maps: list[float] | None = None
) -> list[BatchPlan]:
    return plan_epoch(
        batching, dataset, maps, image_size=SIZE, batch_size=4, seed=seed, epoch=epoch
    )  # fmt: skip


def _shown(plans: list[BatchPlan]) -> list[int]:
    return [visit.image for plan in plans for slot in plan.slots for visit in slot.visits]


def _loader(dataset: Dataset, batching: Batching, hyp: Hyp = STILL, workers: int = 0) -> TrainLoader:
    return TrainLoader(
        dataset,
        ImageStore(dataset, SIZE),
        hyp=hyp,
        image_size=SIZE,
        batch_size=4,
        seed=1,
        workers=workers,
        batching=batching,
    )


def _same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        a.indices == b.indices and torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets)
        and (a.scaled_hw, a.loss_scale) == (b.scaled_hw, b.loss_scale)
        for a, b in zip(left, right, strict=True)
    )  # fmt: skip


EVERY = [
    Batching(rect=True),
    Batching(quad=True),
    Batching(image_weights=True),
    Batching(multi_scale=True),
    Batching(rect=True, quad=True, image_weights=True, multi_scale=True),
]


@pytest.mark.parametrize("batching", EVERY, ids=str)
def test_an_epoch_started_late_equals_the_tail_of_the_whole_for_any_workers(
    dataset: Dataset, batching: Batching
) -> None:
    loader = _loader(dataset, batching, Hyp())
    loader.class_maps = [0.9, 0.1]
    whole = list(loader.epoch(3))
    assert len(whole) == len(loader)
    again = _loader(dataset, batching, Hyp(), workers=3)
    again.class_maps = [0.9, 0.1]
    assert _same(whole, list(again.epoch(3)))
    assert _same(whole[2:], list(again.epoch(3, start=2)))
    assert not _same(whole, list(loader.epoch(4)))


@pytest.mark.parametrize("batching", [b for b in EVERY if not b.image_weights], ids=str)
def test_every_image_is_visited_once(dataset: Dataset, batching: Batching) -> None:
    assert sorted(_shown(_plan(dataset, batching))) == list(range(16))


def test_rect_batches_have_the_smallest_shape_of_like_aspects_in_another_order_each_epoch(
    dataset: Dataset,
) -> None:
    plans = _plan(dataset, Batching(rect=True))
    for plan in plans:
        shapes = [tuple(dataset.shapes_hw[visit.image]) for slot in plan.slots for visit in slot.visits]
        assert plan.hw == tuple(np.max(shapes, 0))
    assert {plan.hw for plan in plans} == {(32, 64), (64, 64), (64, 32)}
    assert {tuple(plan.hw for plan in _plan(dataset, Batching(rect=True), epoch)) for epoch in range(5)} != {
        tuple(plan.hw for plan in plans)
    }


def test_rect_shows_whole_images_without_mosaics(dataset: Dataset) -> None:
    for batch in _loader(dataset, Batching(rect=True), Hyp(**{**STILL.as_dict(), "mosaic": 1.0})).epoch(0):
        for position, index in enumerate(batch.indices):
            height, width = dataset.shapes_hw[index]
            reds = batch.images[position, 0]
            assert (reds == 16 * index).sum() >= height * width
            assert ((reds == 16 * index) | (reds == 114)).all()


def test_quad_makes_one_image_of_four_images_or_enlarges_one(dataset: Dataset) -> None:
    enlarged = tiled = 0
    for epoch in range(8):
        loader = _loader(dataset, Batching(quad=True))
        plans = _plan(dataset, Batching(quad=True), epoch)
        for plan, batch in zip(plans, loader.epoch(epoch), strict=True):
            assert batch.images.shape == (1, 3, 2 * SIZE, 2 * SIZE)
            assert batch.loss_scale == 4
            (slot,) = plan.slots
            images = [visit.image for visit in slot.visits]
            shown = set(batch.images[0, 0].unique().tolist()) - {114}
            if slot.enlarged:
                enlarged += 1
                assert 16 * images[0] in shown
                height, width = dataset.shapes_hw[images[0]]
                assert (batch.images[0, 0] == 16 * images[0]).sum() >= 4 * (height - 1) * (width - 1)
                expected = dataset.labels[images[0]][:, 3:5] * (width, height) / SIZE
                assert np.allclose(batch.targets[:, 4:].numpy(), expected, atol=1e-5)
            else:
                tiled += 1
                assert shown == {16 * image for image in images}
                assert len(batch.targets) == sum(len(dataset.labels[image]) for image in images)
                for row in batch.targets.numpy():  # each label lies on the image that it is of
                    x, y = (row[2:4] * 2 * SIZE).astype(int)
                    image = images[2 * (y // SIZE) + x // SIZE]
                    assert batch.images[0, 0, y, x].item() == 16 * image
                    assert row[1] == dataset.labels[image][0, 0]
                    assert row[4] <= 0.26
    assert enlarged > 8
    assert tiled > 8


def test_quad_keeps_the_images_that_do_not_fill_an_image(dataset: Dataset) -> None:
    short = plan_epoch(
        Batching(quad=True), dataset, None, image_size=SIZE, batch_size=12, seed=1, epoch=0
    )  # fmt: skip
    assert [len(plan.slots) for plan in short] == [3, 1]
    with pytest.raises(ConfigError, match="multiple of 4"):
        Batching(quad=True).check(6)


def test_image_weights_go_by_the_rarity_and_the_map_of_the_classes(dataset: Dataset) -> None:
    weights = image_weights(dataset.labels, 2, None)
    assert weights.sum() == pytest.approx(1)
    assert weights[3] == pytest.approx(0.5)  # the only image of class 1; the other 14 share the other half
    assert weights[4] == 0
    assert image_weights(dataset.labels, 2, [0.0, 0.5])[3] == pytest.approx(0.25 / 1.25)
    assert image_weights(dataset.labels, 2, [0.2, 1.0])[3] == 0
    nothing = [np.zeros((0, 5), np.float32)] * 3
    assert image_weights(nothing, 2, None).tolist() == pytest.approx([1 / 3] * 3)
    assert image_weights(dataset.labels, 2, [1.0, 1.0]).tolist() == pytest.approx([1 / 16] * 16)


def test_drawn_images_follow_the_weights_and_none_looks_the_same_twice(dataset: Dataset) -> None:
    plans = [_plan(dataset, Batching(image_weights=True), epoch) for epoch in range(100)]
    counts = Counter(image for plan in plans for image in _shown(plan))
    assert counts[3] == pytest.approx(800, abs=100)
    assert 4 not in counts
    visits = [visit for plan in plans[0] for slot in plan.slots for visit in slot.visits]
    assert len(set(visits)) == 16
    low = _plan(dataset, Batching(image_weights=True), maps=[0.0, 0.99])
    assert Counter(_shown(low))[3] <= 2


def test_multi_scale_draws_every_size_in_strides_and_scales_on_the_device(dataset: Dataset) -> None:
    sizes = Counter()
    for epoch in range(50):
        for plan in plan_epoch(
            Batching(multi_scale=True), dataset, None, image_size=128, batch_size=4, seed=1, epoch=epoch
        ):
            assert plan.hw == (128, 128)
            sizes[plan.scaled_hw or plan.hw] += 1
    assert set(sizes) == {(side, side) for side in (64, 96, 128, 160, 192)}
    assert min(sizes.values()) > 20
    cpu = Compute(torch.device("cpu"), False, 1)
    images = torch.full((2, 3, 64, 64), 51, dtype=torch.uint8)
    scaled = to_input(images, cpu, (96, 32))
    assert scaled.shape == (2, 3, 96, 32)
    assert torch.allclose(scaled, torch.tensor(0.2))
    assert to_input(images, cpu).shape == (2, 3, 64, 64)


@pytest.mark.parametrize(
    ("flags", "hyp", "words"),
    [
        ({}, {"copy_paste": 0.5}, "no training label is a polygon"),
        ({"rect": True}, {}, "mosaic 1 has no effect"),
        ({"image_weights": True, "noval": True}, {}, "--noval validates only the last epoch"),
        ({"image_weights": True, "evolve": 3}, {}, "a search validates only the last epoch"),
        ({"rect": True}, {"mosaic": 0.0}, ""),
    ],
)
def test_what_is_set_and_does_nothing_is_named(
    tiny_data: Path,
    tmp_path: Path,
    flags: dict[str, bool],
    hyp: dict[str, float],
    words: str,
    said: list[str],
) -> None:
    config = TrainConfig(data=str(tiny_data), **flags)
    data = load_data(config, 64, tmp_path)
    said.clear()
    warn_of_idle(config, Hyp(**hyp), data)
    assert (words in said[0]) if words else not said


def test_cache_val_keeps_the_images_of_validation_only(tiny_data: Path, tmp_path: Path) -> None:
    data = load_data(TrainConfig(data=str(tiny_data), cache="val"), 64, tmp_path)
    assert (data.train_images.mode, data.val_images.mode) == ("off", "ram")


def test_a_training_with_all_of_them_resumes_to_the_same_weights(tiny_args: list[str], runs: Path) -> None:
    settings.update({"mlflow": False, "tensorboard": False})
    common = [
        *tiny_args,
        "--noplots",
        "--rect",
        "--quad",
        "--image-weights",
        "--multi-scale",
        "--epochs",
        "12",  # enough that the signal below is never too late
    ]
    assert train.main([*common, "--name", "whole"]) == 0
    command = [sys.executable, "app/train.py", *common, "--name", "cut"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2/12"):  # the first validation is done
            process.send_signal(signal.SIGTERM)
            break
    process.stdout.read()
    assert process.wait(60) == 143
    last = runs / "train" / "cut" / "weights" / "last.pt"
    assert load_checkpoint(last)["class_maps"] is not None
    assert train.main(["--resume", str(last)]) == 0
    whole, cut = (load_checkpoint(runs / "train" / name / "weights" / "last.pt") for name in ("whole", "cut"))
    assert whole["class_maps"] == cut["class_maps"]
    assert all(torch.equal(whole["model"][key], cut["model"][key]) for key in whole["model"])
