"""Matching, scores and confusion in cases small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from app.metrics import ConfusionMatrix, average_precision, fitness, match_detections

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


def test_perfect_detections_score_one() -> None:
    correct = np.ones((3, 10), dtype=bool)
    metrics = average_precision(correct, np.array([0.9, 0.8, 0.7]), np.array([0, 0, 2]), np.array([0, 0, 2]))
    assert metrics.classes.tolist() == [0, 2]
    assert metrics.labels.tolist() == [2, 1]
    assert metrics.map5095 == pytest.approx(0.995, abs=1e-3)  # the classic's envelope falls to 0 at recall 1
    assert metrics.precision == metrics.recall == pytest.approx(1.0)


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
