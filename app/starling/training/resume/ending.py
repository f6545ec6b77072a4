"""The end of a training: which of its last steps are done in a run folder, and which are still to do."""

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
"""Name of the file with the figures of a run, as `--json` prints them, and the names of the run's final files."""
MARK = ".finished"
"""Name of the file that is written last of all, after the results have been delivered."""
_MADE = ("results.csv", "results.png", "confusion_matrix.*", "*_curve.png", "val_batch*.jpg", "worst.jpg")
"""Patterns of the files that the end of a training writes, and can write again."""


class Ending(enum.Enum):
    """The next step that a training still has to do."""

    TRAINING = "training"
    """Epochs remain to be trained."""
    FINISHING = "finishing"
    """All epochs are done; figures, plots or the last event are missing."""
    DELIVERING = "delivering"
    """All files and events are written; the copy to `--bucket` or to the trackers may be incomplete."""
    WHOLE = "whole"
    """No step is left."""


def is_over(rows: Sequence[EpochRow], epochs_done: int, config: TrainConfig) -> bool:
    """Return whether no further epoch is to be trained: all epochs are done, or patience has run out."""
    return epochs_done >= config.epochs or out_of_patience(rows, config.patience)


def what_is_left(run: RunDir, state: Mapping[str, Any], config: TrainConfig) -> Ending:
    """Return the next step of the run whose newest checkpoint is `state`, under the configuration of the resume."""
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
    """Return the figures of the best epoch that `--json` prints; None for a figure that is NaN."""
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
    """Write summary.json, after all other final files; `notes` are the notes of the run's resumes.

    `more` holds further fields that `--json` prints.
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
    """Return what `write_summary` wrote; an empty mapping if the file is missing or garbled."""
    return _read(run.path / SUMMARY)


def read_account(run: RunDir) -> dict[str, Any]:
    """Return the fields `notes`, `cut_list` and `left_out` of summary.json; None for a missing field.

    `notes` say that no epoch scored, and what kept resumes from being bit-equal.
    """
    summary = read_summary(run)
    return {key: summary.get(key) for key in ("notes", "cut_list", "left_out")}


def write_mark(run: RunDir, rows: Sequence[EpochRow], run_uuid: str) -> None:
    """Write the mark of a run that is finished and delivered."""
    write_atomic(run.path / MARK, json.dumps({"run_uuid": run_uuid, "epochs_done": len(rows)}) + "\n")


def _read(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of the run folder; an empty mapping if the file is missing or garbled."""
    try:
        content = parse_json(read_file(path))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_there(folder: Path, name: object) -> bool:
    return isinstance(name, str) and "/" not in name and is_file(folder / name)
