"""Matching, scores and confusion in cases small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from starling.boxes.geometry import iou_matrix
from starling.boxes.matching import IOU_THRESHOLDS, device, host, match_detections, match_images
from starling.metrics import ConfusionMatrix, average_precision, fitness

LABEL = torch.tensor([[1.0, 10, 10, 50, 50]])
EXACT = [10.0, 10, 50, 50, 0.9, 1]


def test_an_exact_detection_is_correct_at_every_threshold() -> None:
    assert match_detections(torch.tensor([EXACT]), LABEL).all()


def test_the_wrong_class_is_never_correct() -> None:
    assert not match_detections(torch.tensor([[10.0, 10, 50, 50, 0.9, 0]]), LABEL).any()


def test_a_label_is_found_once_by_the_more_confident_detection() -> None:
    twice = torch.tensor([EXACT, [10.0, 10, 50, 50, 0.5, 1]])
    assert match_detections(twice, LABEL).any(1).tolist() == [True, False]


def test_a_less_confident_detection_counts_where_the_first_overlaps_too_little() -> None:
    loose = [10.0, 10, 50, 37, 0.9, 1]  # IoU 0.675
    correct = match_detections(torch.tensor([loose, [*EXACT[:4], 0.5, 1]]), LABEL)
    assert correct[0].tolist() == [True] * 4 + [False] * 6
    assert torch.equal(correct[1], ~correct[0])


def test_images_without_labels_or_detections_have_nothing_correct() -> None:
    assert match_detections(torch.tensor([EXACT]), torch.zeros(0, 5)).tolist() == [[False] * 10]
    assert match_detections(torch.zeros(0, 6), LABEL).shape == (0, 10)


def scene(seed: int, labels: int, found: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return detections [found,6], by falling confidence, near [labels,5] labels of two classes that crowd."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(labels, 2, generator=generator) * 60
    boxes = torch.cat((low, low + 20 + torch.rand(labels, 2, generator=generator) * 20), dim=1)
    classes = torch.randint(2, (labels, 1), generator=generator).float()
    of = torch.randint(max(labels, 1), (found,), generator=generator)
    near = boxes[of] if labels else torch.rand(found, 4, generator=generator) + torch.tensor([0.0, 0, 9, 9])
    near = near + torch.randn(found, 4, generator=generator) * 2
    confidence = torch.rand(found, 1, generator=generator).sort(0, descending=True)[0]
    kind = torch.randint(2, (found, 1), generator=generator).float()
    return torch.cat((near, confidence, kind), dim=1), torch.cat((classes, boxes), dim=1)


SCENES = [
    scene(seed, labels, found)
    for seed, (labels, found) in enumerate([(6, 40), (0, 5), (9, 80), (3, 0), (0, 0)])
]


def together() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return detections, whose they are, and labels of all scenes."""
    detections = torch.cat([found for found, _ in SCENES])
    image = torch.arange(len(SCENES)).repeat_interleave(torch.tensor([len(found) for found, _ in SCENES]))
    labels = torch.zeros(len(SCENES), max(len(labels) for _, labels in SCENES), 5)
    labels[..., 0] = -1
    for place, (_, rows) in enumerate(SCENES):
        labels[place, : len(rows)] = rows
    return detections, image, labels


def claimed_one_by_one(detections: torch.Tensor, labels: torch.Tensor) -> list[list[bool]]:
    """Return what `match_detections` promises, by taking each detection and threshold in turn."""
    correct = [[False] * len(IOU_THRESHOLDS) for _ in detections]
    for column, threshold in enumerate(IOU_THRESHOLDS):
        taken: set[int] = set()
        for row, detection in enumerate(detections):
            overlap = iou_matrix(detection[None, :4], labels[:, 1:])[0] * (labels[:, 0] == detection[5])
            if not len(overlap):
                continue
            label = int(overlap.argmax())
            if overlap[label] >= torch.tensor(threshold) and label not in taken:
                taken.add(label)
                correct[row][column] = True
    return correct


def test_claims_come_out_as_if_taken_one_by_one() -> None:
    matched = [match_detections(detections, labels) for detections, labels in SCENES]
    assert [rows.tolist() for rows in matched] == [claimed_one_by_one(*images) for images in SCENES]
    assert sum(int(rows.sum()) for rows in matched) > 20


def test_images_matched_together_match_as_each_alone() -> None:
    detections, image, labels = together()
    correct = match_images(detections, image, labels)
    alone = [match_detections(found, rows) for found, rows in SCENES]
    assert torch.equal(correct, torch.cat(alone))


def test_both_ways_match_alike() -> None:
    detections, image, labels = together()
    limits = torch.tensor(IOU_THRESHOLDS)
    found = host.match(detections, image, labels, limits)
    assert found.any()
    assert torch.equal(found, device.match(detections, image, labels, limits))


def test_images_without_any_label_match_nothing_together() -> None:
    detections, image, labels = together()
    assert not match_images(detections, image, labels[:, :0]).any()


def test_perfect_detections_score_one() -> None:
    correct = np.ones((3, 10), dtype=bool)
    metrics = average_precision(correct, np.array([0.9, 0.8, 0.7]), np.array([0, 0, 2]), np.array([0, 0, 2]))
    assert metrics.classes.tolist() == [0, 2]
    assert metrics.labels.tolist() == [2, 1]
    assert metrics.map5095 == pytest.approx(0.995, abs=1e-3)  # the envelope falls to 0 at recall 1
    assert metrics.precision == metrics.recall == pytest.approx(1.0)


@pytest.mark.parametrize(("found", "labels"), [(1, 4), (300, 1000), (3, 4)])
def test_labels_beyond_the_last_recall_add_nothing_to_the_score(found: int, labels: int) -> None:
    correct = np.ones((found, 10), dtype=bool)
    metrics = average_precision(correct, np.linspace(0.9, 0.5, found), np.zeros(found), np.zeros(labels))
    assert metrics.map50 == pytest.approx(found / labels, abs=0.01)  # every detection is right
    beyond = metrics.curves.confidence > found / labels  # the axis of recall is the same grid
    assert metrics.curves.precision_at_recall[0, beyond].tolist() == [0] * int(beyond.sum())


def test_a_shorter_list_of_detections_never_scores_higher() -> None:
    stream = np.random.default_rng(5)
    correct = (stream.random((200, 1)) < np.linspace(0.9, 0.1, 200)[:, None]) & np.ones((200, 10), bool)
    confidence, actual = np.linspace(1, 0, 200), np.zeros(300)  # most labels lie beyond the last recall
    scores = [
        average_precision(correct[:kept], confidence[:kept], np.zeros(kept), actual).map5095
        for kept in (10, 50, 100, 200)
    ]
    assert scores == sorted(scores)


def test_a_class_without_detections_scores_zero_and_counts_in_the_mean() -> None:
    metrics = average_precision(
        np.ones((1, 10), dtype=bool), np.array([0.9]), np.array([0]), np.array([0, 1])
    )
    assert metrics.ap[1].tolist() == [0] * 10
    assert metrics.map50 == pytest.approx(metrics.ap[0, 0] / 2)


@pytest.mark.parametrize("labels", [[], [0, 1]])
def test_no_detections_at_all_scores_zero(labels: list[int]) -> None:
    nothing = np.zeros(0)
    metrics = average_precision(np.zeros((0, 10), dtype=bool), nothing, nothing, np.array(labels))
    assert metrics.map50 == metrics.map5095 == metrics.recall == metrics.fitness == 0


def test_classes_without_labels_take_the_mean() -> None:
    metrics = average_precision(
        np.ones((1, 10), dtype=bool), np.array([0.9]), np.array([1]), np.array([1, 1])
    )
    scores = metrics.map_by_class(3)
    assert scores[0] == scores[2] == metrics.map5095
    assert scores[1] == pytest.approx(metrics.ap[0].mean())


def test_fitness_weighs_the_strict_score_nine_to_one() -> None:
    assert fitness(0.5, 0.3) == pytest.approx(0.32)


def test_confusion_counts_hits_mixups_misses_and_false_alarms() -> None:
    matrix = ConfusionMatrix(2)
    labels = torch.tensor([[0.0, 0, 0, 10, 10], [1.0, 20, 20, 30, 30], [1.0, 60, 60, 70, 70]])
    detections = torch.tensor(
        [
            [0.0, 0, 10, 10, 0.9, 0],  # hit
            [20.0, 20, 30, 30, 0.8, 0],  # a 1 taken for a 0
            [90.0, 90, 99, 99, 0.7, 1],  # false alarm
            [60.0, 60, 70, 70, 0.2, 1],  # below the confidence, so a miss
        ]
    )
    matrix.add(detections, labels)
    assert matrix.counts.tolist() == [[1, 1, 0], [0, 0, 1], [0, 1, 0]]
    assert matrix.normalised()[:, 1].tolist() == [0.5, 0, 0.5]


def test_confusion_of_empty_images_stays_empty() -> None:
    matrix = ConfusionMatrix(2)
    matrix.add(torch.zeros(0, 6), torch.zeros(0, 5))
    assert matrix.counts.sum() == 0


def test_confusion_of_images_together_is_the_sum_of_each_alone() -> None:
    whole, alone = ConfusionMatrix(2), ConfusionMatrix(2)
    whole.add_images(*together())
    for detections, labels in SCENES:
        alone.add(detections, labels)
    assert whole.counts.tolist() == alone.counts.tolist()
    assert whole.counts[:2, :2].sum() > 5
    assert whole.counts[2].sum() + whole.counts[:2, :2].sum() == 18  # every label once


def test_confusion_pairs_by_overlap_each_box_once() -> None:
    matrix = ConfusionMatrix(2)
    label = torch.tensor([[0.0, 0, 0, 10, 10]])
    looser, closer = [0.0, 0, 10, 8, 0.9, 0], [0.0, 0, 10, 9, 0.8, 1]
    matrix.add(torch.tensor([looser, closer]), label)
    assert matrix.counts.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0]]
