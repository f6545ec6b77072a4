"""The end of a training: how much of it a run folder holds, and what is still to be done."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starling.core.files.atomic import write_atomic
from starling.core.files.regular import is_file
from starling.core.files.safe_open import read_file
from starling.core.plain_json import parse_json
from starling.core.settings.train import TrainConfig
from starling.outputs.run_dir import RunDir
from starling.tracking.events import last_status
from starling.training.checkpoint import kept_row, out_of_patience, saved_row, unscored
from starling.training.reporting.results import EpochRow

SUMMARY = "summary.json"
"""What a run reached, as `--json` prints it, and which files its end has made."""
MARK = ".finished"
"""Written last of all, when the results have been delivered too."""
_MADE = ("results.csv", "results.png", "confusion_matrix.*", "*_curve.png", "val_batch*.jpg", "worst.jpg")
"""Files that the end of a training can make again."""


class Ending(enum.Enum):
    """What is left of a training."""

    TRAINING = "training"
    """Epochs are left."""
    FINISHING = "finishing"
    """All epochs are done; figures, plots or the last event are not there."""
    DELIVERING = "delivering"
    """Everything is made and told; it may not have been copied to `--bucket`."""
    WHOLE = "whole"
    """Nothing."""


def is_over(rows: Sequence[EpochRow], epochs_done: int, config: TrainConfig) -> bool:
    """Return whether no further epoch is to be trained: all are done, or patience has run out."""
    return epochs_done >= config.epochs or out_of_patience(rows, config.patience)


def what_is_left(run: RunDir, state: Mapping[str, Any], config: TrainConfig) -> Ending:
    """Return what is left of the run whose newest checkpoint is `state`, under the configuration of the resume."""
    rows = [EpochRow.from_list(values) for values in state["rows"]]
    if not rows or not is_over(rows, state["epoch"], config):
        return Ending.TRAINING
    told = {"run_uuid": state["run_uuid"], "epochs_done": len(rows)}
    summary = read_summary(run)
    made = summary.get("files")
    there = isinstance(made, list) and all(_is_there(run.path, name) for name in made)
    whole = there and told.items() <= summary.items() and saved_row(run.best) is not None
    if not whole or last_status(run.events, state["run_uuid"]) not in ("finished", None):
        return Ending.FINISHING
    if told.items() <= _read(run.path / MARK).items():
        return Ending.WHOLE
    return Ending.DELIVERING if last_status(run.events, state["run_uuid"]) else Ending.FINISHING


def figures_of(rows: Sequence[EpochRow], run: RunDir) -> dict[str, Any]:
    """Return what `--json` prints of the best epoch; a figure that is no number is None."""
    best = kept_row(rows)
    precision, recall, map50, map5095 = (None if math.isnan(value) else value for value in best.metrics)
    return {
        "precision": precision,
        "recall": recall,
        "mAP50": map50,
        "mAP50_95": map5095,
        "fitness": best.fitness if best.validated else None,
        "epoch": best.epoch + 1,
        "run": str(run.path),
        "weights": str(run.best),
    }


def write_summary(
    run: RunDir, rows: Sequence[EpochRow], run_uuid: str, notes: Sequence[str], **more: Any
) -> None:
    """Write summary.json, when all else that the end makes is there; `notes` are those of the run's resumes.

    `more` is what else `--json` prints.
    """
    made = sorted(path.name for pattern in _MADE for path in run.path.glob(pattern) if path.is_file())
    content = {
        **figures_of(rows, run),
        "epochs_done": len(rows),
        "notes": [*filter(None, (unscored(rows),)), *notes],
        **more,
        "files": made,
        "run_uuid": run_uuid,
    }
    write_atomic(run.path / SUMMARY, json.dumps(content, indent=2) + "\n")


def read_summary(run: RunDir) -> dict[str, Any]:
    """Return what `write_summary` wrote; an empty mapping where there is nothing, or something garbled."""
    return _read(run.path / SUMMARY)


def read_account(run: RunDir) -> dict[str, Any]:
    """Return what summary.json adds to the figures: `notes`, `cut_list` and `left_out`, null where there is none.

    `notes` are that no epoch scored, and what kept resumes from being bit-equal.
    """
    summary = read_summary(run)
    return {key: summary.get(key) for key in ("notes", "cut_list", "left_out")}


def write_mark(run: RunDir, rows: Sequence[EpochRow], run_uuid: str) -> None:
    """Note that nothing is left to do."""
    write_atomic(run.path / MARK, json.dumps({"run_uuid": run_uuid, "epochs_done": len(rows)}) + "\n")


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON object of the run folder; an empty one for an absent or garbled file."""
    try:
        content = parse_json(read_file(path))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_there(folder: Path, name: object) -> bool:
    return isinstance(name, str) and "/" not in name and is_file(folder / name)
