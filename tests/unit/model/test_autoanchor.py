"""Anchors follow the labels: found where the given ones do not fit, kept where they do, the same ever after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from starling import settings
from starling.cli import train
from starling.config.yaml_reader import read_yaml, write_yaml
from starling.data.dataset.dataset import Dataset, DatasetDescription
from starling.model.autoanchor import AutoAnchor, cluster_sizes, evolve_anchors, fit_anchors, measure_fit
from starling.model.checkpoint import load_checkpoint
from starling.model.detector import build_detector
from starling.model.initial_weights import InitialWeights, Weights, read_weights
from starling.search import winner
from starling.training.setup import anchors as engine_anchors
from starling.training.setup.anchors import label_sizes
from starling.training.trainer import Trainer
from tests.conftest import TINY_LAYOUT

COCO = np.array(
    [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]], np.float32
).reshape(3, 3, 2)


def slivers(count: int = 2000) -> Any:
    """Return sizes of long thin things, as ships from above: no COCO anchor is of their shape."""
    rng = np.random.default_rng(7)
    width = np.exp(rng.normal(4.5, 0.6, count))
    return np.stack((width, width / rng.uniform(12, 20, count)), axis=1).astype(np.float32)


def test_labels_that_coco_anchors_miss_are_found_with_new_ones() -> None:
    labels = slivers()
    before = measure_fit(labels, COCO.reshape(-1, 2), 4)
    decision = fit_anchors(labels, COCO, anchor_t=4, seed=0)
    after = measure_fit(labels, decision.anchors_px.reshape(-1, 2), 4)
    assert decision.changed
    assert before.recall < 0.5
    assert after.recall > 0.98
    assert after.fitness > before.fitness
    areas = decision.anchors_px.prod(axis=-1).ravel()
    assert (np.diff(areas) >= 0).all()
    assert f"{before.recall:.4f} -> {after.recall:.4f}" in decision.report
    assert len(decision.report.splitlines()) == 1


def test_anchors_that_fit_stay_unless_they_are_provisional() -> None:
    rng = np.random.default_rng(0)
    labels = COCO.reshape(-1, 2)[rng.integers(9, size=500)] * rng.uniform(0.7, 1.4, (500, 2))
    kept = fit_anchors(labels, COCO, anchor_t=4, seed=0)
    assert not kept.changed
    assert kept.anchors_px is COCO
    assert "the anchors stay" in kept.report
    assert fit_anchors(labels, COCO * 1.5, anchor_t=4, seed=0, provisional=True).changed


def test_anchors_stay_where_nothing_is_better() -> None:
    # One anchor can take one of two far groups, and has the larger one exactly.
    labels = np.array([[10, 10]] * 6 + [[1000, 1000]] * 4, np.float32)
    decision = fit_anchors(labels, np.array([[[10.0, 10.0]]]), anchor_t=4, seed=0)
    assert not decision.changed
    assert "no better" in decision.report


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros((0, 2), np.float32), "no labels"),
        (np.full((8, 2), 5000, np.float32), "8 labels"),
        (np.full((50, 2), 1.5, np.float32), "0 labels of 2 px and more"),
    ],
)
def test_too_few_labels_leave_the_anchors_and_say_so(labels: Any, words: str) -> None:
    decision = fit_anchors(labels, COCO, anchor_t=4, seed=0)
    assert not decision.changed
    assert words in decision.report


def test_the_seed_alone_decides_the_result() -> None:
    first, again, other = (fit_anchors(slivers(400), COCO, anchor_t=4, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(first.anchors_px, again.anchors_px)
    assert not np.array_equal(first.anchors_px, other.anchors_px)


def test_fit_is_the_share_of_labels_within_the_threshold_and_their_mean_likeness() -> None:
    labels = np.array([[10, 10], [10, 25], [10, 45], [3, 10]], np.float32)
    anchors = np.array([[10, 10], [200, 200]], np.float32)
    fit = measure_fit(labels, anchors, anchor_t=4)
    assert fit.recall == 0.75
    assert fit.fitness == pytest.approx((1 + 10 / 25 + 3 / 10) / 4, rel=1e-5)


def test_clusters_of_sizes_are_found_whatever_their_scale() -> None:
    rng = np.random.default_rng(0)
    centres = np.array([[5, 100], [5, 900], [50, 100], [50, 900]])
    labels = np.repeat(centres, 50, axis=0) * rng.uniform(0.95, 1.05, (200, 2))
    found = cluster_sizes(labels, 4, rng)
    found = found[np.argsort(found[:, 0] * 100 + found[:, 1])]
    assert found == pytest.approx(centres, rel=0.03)


def test_equal_labels_give_equal_anchors() -> None:
    decision = fit_anchors(np.full((20, 2), 7, np.float32), COCO, anchor_t=1.2, seed=0)
    assert decision.changed
    assert decision.anchors_px.reshape(-1, 2).min(axis=0) == pytest.approx([7, 7], abs=0.01)


def test_evolution_never_loses_fitness_and_keeps_sides_of_two_pixels() -> None:
    labels = np.random.default_rng(1).uniform(0.5, 9, (300, 2)).astype(np.float32)
    start = np.array([[2.0, 2.0], [100.0, 3.0]])
    found = evolve_anchors(labels, start, 4, np.random.default_rng(0))
    assert measure_fit(labels, found, 4).fitness > measure_fit(labels, start, 4).fitness
    assert found.min() >= 2


def test_label_sizes_are_those_of_the_letterboxed_image(tiny_data: Path) -> None:
    split = Dataset.load(DatasetDescription.from_yaml(tiny_data), "train")
    height, width = split.shapes_hw[0]
    expected = split.labels[0][:, 3:5] * [width, height] * 64 / max(width, height)
    assert label_sizes(split, 64)[: len(expected)] == pytest.approx(expected, rel=1e-5)


def test_the_layout_of_a_detector_holds_the_anchors_it_was_given_later() -> None:
    detector = build_detector(TINY_LAYOUT, nc=2)
    detector.head.set_anchors(torch.tensor([[[3.1, 4.2]] * 3, [[50.3, 60.4]] * 3]))
    again = build_detector(detector.layout, nc=2)
    assert torch.equal(again.head.anchors, detector.head.anchors)


# --- in a training ------------------------------------------------------------------------------------------


@pytest.fixture
def misfit_args(tiny_args: list[str], runs: Path, tmp_path: Path) -> list[str]:
    """Return a training whose layout has anchors far too large for the labels; without the tracking bridge."""
    settings.update({"mlflow": False, "tensorboard": False})
    layout = read_yaml(TINY_LAYOUT)
    layout["anchors"] = [[side * 40 for side in level] for level in layout["anchors"]]
    write_yaml(tmp_path / "misfit.yaml", layout)
    return [*tiny_args, "--noplots", "--epochs", "1", "--cfg", str(tmp_path / "misfit.yaml")]


def test_a_training_fits_its_anchors_and_every_file_it_leaves_has_them(
    misfit_args: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(misfit_args) == 0
    assert capsys.readouterr().out.count("AutoAnchor: best possible recall 0.0000 -> ") == 1
    weights = runs / "train" / "exp" / "weights"
    last = load_checkpoint(weights / "last.pt")
    anchors = build_detector(last["layout"], nc=3).head.anchors
    assert anchors.max() < 40 / 4
    (key,) = (key for key in last["model"] if key.endswith("anchors"))
    assert torch.equal(last["model"][key], anchors)
    assert torch.equal(last["ema"][key], anchors)
    best = read_weights(weights / "best.pt")
    assert best.layout is not None
    rebuilt = InitialWeights(best.layout, best).build(("a", "b", "c"), None)
    assert torch.equal(rebuilt.head.anchors, anchors)
    assert torch.equal(rebuilt.head.anchors_px.flatten(1), torch.tensor(rebuilt.layout["anchors"]))


def test_noautoanchor_keeps_the_anchors(
    misfit_args: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*misfit_args, "--noautoanchor"]) == 0
    assert "AutoAnchor" not in capsys.readouterr().out
    layout = load_checkpoint(runs / "train" / "exp" / "weights" / "last.pt")["layout"]
    assert layout["anchors"][0][0] == 400


def test_a_resumed_training_has_the_anchors_of_the_first_part_in_head_and_loss(
    misfit_args: list[str], runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hyp.yaml").write_text("anchors: 4.4")
    assert train.main([*misfit_args, "--hyp", str(tmp_path / "hyp.yaml")]) == 0
    before = load_checkpoint(runs / "train" / "exp" / "weights" / "last.pt")["layout"]["anchors"]
    assert len(before[0]) == 8
    trainers: list[Trainer] = []
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda trainer: (trainers.append(trainer), fit(trainer))[1])
    monkeypatch.setattr(engine_anchors, "fit_anchors", None)
    assert train.main(["--resume", "--epochs", "2"]) == 0
    (trainer,) = trainers
    assert torch.equal(trainer.model.head.anchors_px.flatten(1), torch.tensor(before))
    assert torch.equal(trainer.loss.anchors, trainer.model.head.anchors)


def test_weights_bring_their_anchors_unless_a_layout_or_a_number_is_asked_for() -> None:
    trained = build_detector(TINY_LAYOUT, nc=1, anchors=[[5, 5, 6, 6, 7, 7], [50, 50, 60, 60, 70, 70]])
    weights = Weights(Path("best.pt"), trained.state_dict(), None, ("a",))
    layout = read_yaml(TINY_LAYOUT)

    def first_side(start: InitialWeights, anchors: float | None = None) -> float:
        return float(start.build(("a",), anchors).head.anchors_px[0, 0, 0])

    assert first_side(InitialWeights(layout, weights)) == 5
    assert first_side(InitialWeights(layout, weights, layout_given=True)) == 10
    assert first_side(InitialWeights(layout, weights), anchors=3) == 16, "a square of two strides"


@pytest.mark.parametrize(
    ("in_layout", "weights", "layout_given", "hyp", "provisional"),
    [
        ([[10, 13], [30, 61]], False, True, None, False),
        ([[10, 13], [30, 61]], False, True, 3.0, True),
        (3, False, True, None, True),
        (None, False, True, None, True),
        (3, True, True, None, True),
        (3, True, False, None, False),
        (3, True, False, 3.0, True),
    ],
)
def test_anchors_are_provisional_where_nobody_gave_sizes(
    in_layout: Any, weights: bool, layout_given: bool, hyp: float | None, provisional: bool
) -> None:
    layout = {} if in_layout is None else {"anchors": in_layout}
    given = Weights(Path("best.pt"), {}, None, ()) if weights else None
    assert InitialWeights(layout, given, layout_given).anchors_are_provisional(hyp) is provisional


def test_a_search_fits_anchors_once_for_all_candidates(
    misfit_args: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decisions: list[AutoAnchor] = []

    def counted(*args: Any, **kwargs: Any) -> AutoAnchor:
        decisions.append(fit_anchors(*args, **kwargs))
        return decisions[-1]

    monkeypatch.setattr(engine_anchors, "fit_anchors", counted)
    monkeypatch.setattr(winner.plots, "draw_labels", lambda *args: None)
    monkeypatch.setattr(winner, "draw_weights", lambda *args: None)
    assert train.main([*misfit_args, "--evolve", "2", "--project", "blood", "--name", "search"]) == 0
    assert [decision.changed for decision in decisions] == [True]
    best = load_checkpoint(runs / "blood" / "search" / "weights" / "best.pt")
    assert best["layout"]["anchors"][0][0] < 40
