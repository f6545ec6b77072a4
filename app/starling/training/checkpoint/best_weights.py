"""Which epoch is the best one, and whether `best.pt` holds its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from starling.core.errors import CheckpointError
from starling.model.checkpoint import load_checkpoint
from starling.training.reporting.results import EpochRow


def best_row(rows: Sequence[EpochRow]) -> EpochRow | None:
    """Return the validated row with the highest fitness, the newest of equals; None if none was validated."""
    return max((row for row in rows if row.validated), key=lambda row: (row.fitness, row.epoch), default=None)


def kept_row(rows: Sequence[EpochRow]) -> EpochRow:
    """Return the best row; the last one where none was validated."""
    return best_row(rows) or rows[-1]


def out_of_patience(rows: Sequence[EpochRow], patience: int) -> bool:
    """Return whether no epoch of the last `patience` ones was better than all before; never for a patience of 0."""
    best = best_row(rows)
    if not patience or best is None:
        return False
    # The first of equals: an epoch that is only as good is no improvement.
    improved = next(row.epoch for row in rows if row.validated and row.fitness == best.fitness)
    return rows[-1].epoch - improved >= patience


def unscored(rows: Sequence[EpochRow]) -> str | None:
    """Return one line that says which weights best.pt holds where no epoch scored; None where one did."""
    best = best_row(rows)
    if best is not None and best.fitness > 0:
        return None
    last = rows[-1].epoch + 1
    validated = sum(row.validated for row in rows)
    if not validated:
        why = "no epoch was scored: the validation gave no number"
    elif validated == 1 < len(rows):
        why = f"no epoch scored: the only validation, of epoch {kept_row(rows).epoch + 1}, gave mAP 0"
    else:
        why = f"no epoch scored: mAP is 0 in all {validated} validations"
    return f"{why}; best.pt holds the weights of epoch {kept_row(rows).epoch + 1} of {last}, the newest"


def holds_best(path: Path, rows: Sequence[EpochRow]) -> bool:
    """Return whether the weights in the file are those of the best of `rows`; False for a missing or damaged file."""
    best, saved = best_row(rows), saved_row(path)
    return best is not None and saved is not None and _same(saved, best)


def held_row(path: Path, rows: Sequence[EpochRow]) -> EpochRow | None:
    """Return which of `rows` the weights in the file are of; None for none of them, a missing or a damaged file."""
    saved = saved_row(path)
    return None if saved is None else next((row for row in rows if _same(row, saved)), None)


def saved_row(path: Path) -> EpochRow | None:
    """Return the last row in a weights file; None for a missing or damaged file."""
    try:
        return EpochRow.from_list(load_checkpoint(path)["rows"][-1])
    except (CheckpointError, LookupError, TypeError, ValueError):
        return None


def _same(one: EpochRow, other: EpochRow) -> bool:
    pairs = zip(one.metrics, other.metrics, strict=True)
    same = all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in pairs)
    return one.epoch == other.epoch and same
