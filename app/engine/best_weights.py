"""Whether `best.pt` holds what the rows of a run say that it should."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from app.engine.checkpoint import load_checkpoint
from app.engine.results import EpochRow
from app.errors import CheckpointError


def best_row(rows: Sequence[EpochRow]) -> EpochRow | None:
    """Return the validated row with the highest fitness, the first of equals; None if none was validated."""
    return max((row for row in rows if row.validated), key=lambda row: row.fitness, default=None)


def holds_best(path: Path, rows: Sequence[EpochRow]) -> bool:
    """Return whether the weights in the file are those of the best of `rows`; False for a missing or damaged file."""
    best = best_row(rows)
    try:
        saved = EpochRow.from_list(load_checkpoint(path)["rows"][-1])
    except (CheckpointError, LookupError, TypeError, ValueError):
        return False
    return best is not None and (saved.epoch, saved.metrics) == (best.epoch, best.metrics)
