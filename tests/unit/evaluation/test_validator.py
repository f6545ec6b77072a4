"""Images validated in batches score as each image does alone, and the listener is called for each image in order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from starling.boxes.geometry import xywhn_to_xyxy
from starling.boxes.matching import match_detections
from starling.boxes.nms import non_max_suppression
from starling.data.augment.letterbox import boxes_to_original, letterbox_geometry
from starling.data.loader.loader import Batch
from starling.device import Compute
from starling.evaluation.validator import (
    INFERENCE,
    LOADING,
    LOSS,
    PRE_PROCESS,
    SCORING,
    SUPPRESSION,
    ScoredImage,
    Validation,
    _Inputs,
    validate,
)
from starling.metrics import ConfusionMatrix, average_precision
from starling.prediction.predictor import to_input

SIDE = 64
SIZES = [(48, 64), (100, 40), (30, 30), (64, 64), (500, 375)]
CPU = Compute(device=torch.device("cpu"), bfloat16=False, cores=1)


class Clairvoyant:
    """A model that finds boxes near the labels of the image whose number is its first pixel, and many elsewhere."""

    names = ("a", "b")
    image_multiple = 32
    nc = 2

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        numbers = (images[:, 0, 0, 0] * 255).round().long().tolist()
        return torch.stack([predicted(number) for number in numbers]), None


def targets(number: int) -> Tensor:
    """Return [n,5] class, xywhn of an image; the third has none."""
    generator = torch.Generator().manual_seed(number)
    count = 0 if number == 2 else number + 3
    kind = torch.randint(2, (count, 1), generator=generator)
    return torch.cat((kind, 0.2 + torch.rand(count, 4, generator=generator) * 0.4), dim=1)


def predicted(number: int) -> Tensor:
    """Return decoded predictions [80,7] of an image."""
    generator = torch.Generator().manual_seed(100 + number)
    rows = torch.rand(80, 7, generator=generator) * torch.tensor([SIDE, SIDE, 40, 40, 1, 1, 1])
    own = targets(number)
    rows[: len(own), :4] = own[:, 1:] * SIDE + torch.randn(len(own), 4, generator=generator)
    rows[: len(own), 4] = 0.9
    return rows


def batch(numbers: list[int], *, padding: bool = False) -> Batch:
    images = torch.zeros(len(numbers), 3, SIDE, SIDE, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(numbers)
    rows = [torch.cat((torch.full((len(targets(n)), 1), i), targets(n)), 1) for i, n in enumerate(numbers)]
    return Batch(
        images=images,
        targets=torch.cat(rows),
        indices=tuple(numbers),
        geometry=tuple(letterbox_geometry(SIZES[n], SIDE, minimal=False) for n in numbers),
        original_hw=tuple(SIZES[n] for n in numbers),
        whole=len(numbers),
        padding=padding,
    )


def one_by_one() -> tuple[list[ScoredImage], list[list[int]], float]:
    """Return what each image should show, the confusion and mAP50-95, by the plain functions for one image."""
    seen, confusion, correct = [], ConfusionMatrix(2), []
    for number, original_hw in enumerate(SIZES):
        geometry = letterbox_geometry(original_hw, SIDE, minimal=False)
        found = non_max_suppression(predicted(number)[None], 0.001, 0.6, multi_label=True)[0]
        detections = boxes_to_original(found, geometry, original_hw)
        corners = xywhn_to_xyxy(targets(number)[:, 1:], (SIDE, SIDE))
        labels = torch.cat((targets(number)[:, :1], boxes_to_original(corners, geometry, original_hw)), 1)
        confusion.add(detections, labels)
        correct.append(match_detections(detections, labels))
        seen.append(ScoredImage(number, original_hw, labels, detections))
    scored = torch.cat([image.detections for image in seen]).numpy()
    actual = torch.cat([image.labels[:, 0] for image in seen]).numpy()
    metrics = average_precision(torch.cat(correct).numpy(), scored[:, 4], scored[:, 5], actual)
    return seen, confusion.counts.tolist(), metrics.map5095


@pytest.mark.parametrize("size", [1, 2, 5])
def test_images_in_batches_score_as_each_alone(size: int) -> None:
    heard: list[ScoredImage] = []
    batches = [batch(list(range(first, min(first + size, 5)))) for first in range(0, 5, size)]
    validation = validate(Clairvoyant(), batches, None, CPU, on_image=heard.append)
    expected, confusion, map5095 = one_by_one()
    assert validation.confusion.counts.tolist() == confusion
    assert validation.metrics.map5095 == map5095 > 0.1
    assert validation.metrics.labels.sum() == sum(len(image.labels) for image in expected)
    assert [image.index for image in heard] == list(range(5))
    for ours, theirs in zip(heard, expected, strict=True):
        assert ours.original_hw == theirs.original_hw
        assert torch.equal(ours.detections, theirs.detections)
        assert torch.equal(ours.labels, theirs.labels)


def test_labels_in_any_order_reach_their_images() -> None:
    ordered = batch([0, 1, 2])
    mixed = replace(ordered, targets=ordered.targets[torch.randperm(len(ordered.targets))])
    assert scores(validate(Clairvoyant(), [mixed], None, CPU)) == scores(
        validate(Clairvoyant(), [ordered], None, CPU)
    )


def scores(validation: Validation) -> tuple[float, list[list[int]]]:
    return validation.metrics.map5095, validation.confusion.counts.tolist()


def test_a_batch_that_only_keeps_a_process_in_step_adds_nothing() -> None:
    heard: list[ScoredImage] = []
    padded = [batch([0, 1]), batch([2], padding=True)]
    validation = validate(Clairvoyant(), padded, None, CPU, on_image=heard.append)
    assert scores(validation) == scores(validate(Clairvoyant(), [batch([0, 1])], None, CPU))
    assert [image.index for image in heard] == [0, 1]


def test_images_done_are_told_after_each_batch_and_all_at_the_end() -> None:
    told: list[int] = []
    validate(Clairvoyant(), [batch([0, 1]), batch([2, 3]), batch([4])], None, CPU, after_batch=told.append)
    assert told == [2, 4, 5]


def test_every_stage_of_every_batch_is_told() -> None:
    laps: list[str] = []
    validate(Clairvoyant(), [batch([0]), batch([1])], None, CPU, lap=laps.append)
    of_a_batch = [LOADING, PRE_PROCESS, INFERENCE, LOSS, SCORING, SUPPRESSION, SCORING]
    assert laps == [*of_a_batch, *of_a_batch, SCORING]


def test_the_model_sees_what_training_feeds_it_in_every_batch() -> None:
    class Witness(Clairvoyant):
        def __call__(self, images: Tensor) -> tuple[Tensor, None]:
            seen.append((images.clone(), images.is_contiguous(memory_format=torch.channels_last)))
            return super().__call__(images)

    seen: list[tuple[Tensor, bool]] = []
    batches = [batch([0, 1, 2]), batch([3]), batch([4, 0, 1, 2])]
    for given in batches:
        given.images[:, :, 1:] = torch.randint(256, given.images[:, :, 1:].shape, dtype=torch.uint8)
    validate(Witness(), batches, None, CPU)
    for given, (pixels, channels_last) in zip(batches, seen, strict=True):
        assert torch.equal(pixels, to_input(given.images, CPU))
        assert channels_last


def test_a_detectors_images_are_rounded_as_autocast_would_round_them() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    rounded = _Inputs(CPU, rounded=True).of(images)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, to_input(images, CPU).to(torch.bfloat16))


def test_previews_hold_the_first_batches_in_their_letterbox() -> None:
    batches = [batch([0, 1]), batch([2, 3]), batch([4])]
    drawn = validate(Clairvoyant(), batches, None, CPU, previews=2).previews
    assert [preview.indices for preview in drawn] == [(0, 1), (2, 3)]
    expected = non_max_suppression(predicted(3)[None], 0.001, 0.6, multi_label=True)[0].numpy()
    assert np.array_equal(drawn[1].detections[1], expected)
