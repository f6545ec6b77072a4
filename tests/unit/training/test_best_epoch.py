"""Of equal fitness the newest epoch is the best one, and where none scored that is said."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from starling import settings
from starling.cli import train
from starling.model.checkpoint import load_checkpoint
from starling.training import trainer
from starling.training.checkpoint import best_row, out_of_patience, unscored
from starling.training.reporting.results import EpochRow

NAN = math.nan


def rows(values: Sequence[float]) -> list[EpochRow]:
    """Return rows whose mAP is as given; NaN: not validated."""
    return [
        EpochRow(epoch, (0.0, 0.0, 0.0), (value, value, value, value), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
        for epoch, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("values", "best"), [([0.1, 0.3, 0.3, 0.2], 2), ([0, 0, 0], 2), ([NAN, 0.2, NAN], 1), ([0.5], 0)]
)
def test_of_equal_fitness_the_newest_epoch_is_the_best(values: list[float], best: int) -> None:
    found = best_row(rows(values))
    assert found is not None
    assert found.epoch == best


def test_an_epoch_that_is_only_as_good_as_the_best_uses_up_patience() -> None:
    assert out_of_patience(rows([0.1, 0.3, 0.3, 0.3]), 2)
    assert not out_of_patience(rows([0.1, 0.3, 0.3]), 2)
    assert out_of_patience(rows([0, 0, 0]), 2)
    assert not out_of_patience(rows([0.1, 0.2, NAN, 0.3]), 2)
    assert not out_of_patience(rows([0.3, 0.1, 0.1, 0.1]), 0)
    assert not out_of_patience(rows([NAN, NAN, NAN]), 1)
    assert not out_of_patience([], 1)


def test_what_best_holds_is_said_only_where_no_epoch_scored() -> None:
    assert unscored(rows([0, 0.1, 0])) is None
    assert unscored(rows([0, 0, 0])) == (
        "no epoch scored: mAP is 0 in all 3 validations; best.pt holds the weights of epoch 3 of 3, the newest"
    )
    assert "the only validation, of epoch 3" in str(unscored(rows([NAN, NAN, 0])))
    assert "no epoch was scored" in str(unscored(rows([NAN, NAN])))


def test_a_training_in_which_no_epoch_scores_says_which_weights_best_holds(
    tiny_args: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings.update({"mlflow": False, "tensorboard": False})
    for value, words in ((0.0, "mAP is 0 in all 2 validations"), (NAN, "gave no number")):
        monkeypatch.setattr(
            trainer,
            "_scores",
            lambda validation, value=value: {"metrics": (value,) * 4, "val_losses": validation.losses},
        )
        assert train.main([*tiny_args, "--noplots", "--json", "--name", f"run{value}"]) == 0
        *lines, figures = capsys.readouterr().out.splitlines()
        (said,) = [line for line in lines if words in line]
        assert "best.pt holds the weights of epoch 2 of 2" in said
        run = runs / "train" / f"run{value}"
        assert [f"{note}; results in {run}" for note in json.loads(figures)["notes"]] == [said]
        assert "NaN" not in figures
        best = load_checkpoint(run / "weights" / "best.pt")
        assert len(best["rows"]) == 2
