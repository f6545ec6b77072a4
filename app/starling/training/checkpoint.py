"""The checkpoints of a run: `last.pt` to resume from, `best.pt` of the best epoch, one file every `--save-period`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from starling.core.errors import CheckpointError
from starling.core.settings.train import TrainConfig
from starling.model.checkpoint import load_checkpoint, save_checkpoint
from starling.outputs.run_dir import RunDir
from starling.training.reporting.results import EpochRow

logger = logging.getLogger(__name__)

State = Callable[[], dict[str, Any]]


class Saver:
    """Decide which checkpoints are due, and save them. One process writes; all processes keep the same account."""

    saved: tuple[int, int] | None
    """Epoch and iteration of the checkpoint that this process saved last."""
    began: tuple[int, int]
    """Epoch and iteration at which this process began."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunDir,
        state: State,
        weights: State,
        *,
        writes: bool,
        clock: Callable[[], float],
    ) -> None:
        """`state` and `weights` return what `last.pt` and `best.pt` are to hold; nothing is written unless `writes`."""
        self._config, self._run = config, run
        self._state, self._weights = state, weights
        self._writes, self._clock = writes, clock
        self._saved_at = clock()
        self.saved = None
        self.began = (0, 0)
        self._kept: EpochRow | None = None
        """The row of the epoch whose weights best.pt holds."""

    def due(self) -> bool:
        """Return whether `--save-minutes` have passed since the last save; always False if another process writes."""
        passed = self._clock() - self._saved_at
        return self._writes and not self._config.nosave and passed >= 60 * self._config.save_minutes

    def is_best(self, row: EpochRow) -> bool:
        """Return whether the row was validated and its fitness is at least that of the weights in best.pt."""
        return row.validated and (self._kept is None or row.fitness >= self._kept.fitness)

    def save_last(self, position: tuple[int, int]) -> None:
        """Save `last.pt` at this epoch and iteration."""
        if self._writes:
            # After a resume the previous checkpoint may be the only intact one: the first save does not replace it.
            previous = None if self.saved is None else self._run.previous
            save_checkpoint(self._run.last, self._state(), previous=previous)
        self.saved, self._saved_at = position, self._clock()

    def save_epoch(self, row: EpochRow, *, best: bool, last: bool) -> Path | None:
        """Save the checkpoints due at the end of the epoch of `row`; return the file saved for `--save-period`."""
        done = row.epoch + 1
        # last.pt is saved first: after a kill between the two saves, best.pt can be rebuilt from last.pt.
        if last or not self._config.nosave:
            self.save_last((done, 0))
        if best:
            self._save_best(row)
        kept = self._kept_of(done)
        if kept is not None:
            save_checkpoint(kept, self._weights())
        return kept

    def _kept_of(self, done: int) -> Path | None:
        """Return the file that `--save-period` keeps after `done` epochs; None if no file is due."""
        period = self._config.save_period
        due = self._writes and period > 0 and done > 0 and done % period == 0
        return self._run.weights / f"epoch{done - 1}.pt" if due else None

    def _save_best(self, row: EpochRow) -> None:
        if self._writes:
            save_checkpoint(self._run.best, self._weights())
        self._kept = row

    def restored(self, rows: Sequence[EpochRow], position: tuple[int, int]) -> None:
        """Find the row whose weights best.pt holds, and write the files that a kill between two saves has prevented."""
        self.began = position
        best = best_row(rows)
        held = held_row(self._run.best, rows) if self._writes else best
        if best is None or held == best:
            self._kept = best
        elif (best.epoch + 1, 0) == position:
            logger.warning(f"{self._run.best}: written anew from the checkpoint, whose epoch is the best")
            self._save_best(best)
        elif held is not None and held.fitness == best.fitness:
            self._kept = held  # an older version kept the first of several epochs with equal fitness
        else:
            logger.warning(
                f"{self._run.best}: the weights of the best epoch ({best.epoch + 1}) are not there; "
                "the file will hold the best of the epochs to come, or the last one's where none comes"
            )
        kept = self._kept_of(position[0]) if not position[1] else None
        if kept is not None and not kept.is_file():  # a kill came before this save
            save_checkpoint(kept, self._weights())

    def finish(self) -> None:
        """Write best.pt if this process has not: a candidate resumed in a new folder may have no best.pt there."""
        if self._kept is None and self._writes:
            save_checkpoint(self._run.best, self._weights())


def best_row(rows: Sequence[EpochRow]) -> EpochRow | None:
    """Return the validated row with the highest fitness, the newest of equal ones; None if no row was validated."""
    return max((row for row in rows if row.validated), key=lambda row: (row.fitness, row.epoch), default=None)


def kept_row(rows: Sequence[EpochRow]) -> EpochRow:
    """Return the best row; the last row if no row was validated."""
    return best_row(rows) or rows[-1]


def out_of_patience(rows: Sequence[EpochRow], patience: int) -> bool:
    """Return whether no epoch of the last `patience` ones was better than all before; False if `patience` is 0."""
    best = best_row(rows)
    if not patience or best is None:
        return False
    # The first of the epochs with the best fitness: an epoch with equal fitness is no improvement.
    improved = next(row.epoch for row in rows if row.validated and row.fitness == best.fitness)
    return rows[-1].epoch - improved >= patience


def unscored(rows: Sequence[EpochRow]) -> str | None:
    """Return one line that says which weights best.pt holds if no epoch has a fitness above 0; otherwise None."""
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
    """Return whether the file holds the weights of the best of `rows`; False for a missing or damaged file."""
    best, saved = best_row(rows), saved_row(path)
    return best is not None and saved is not None and _same(saved, best)


def held_row(path: Path, rows: Sequence[EpochRow]) -> EpochRow | None:
    """Return the row of the epoch whose weights the file holds; None if no row fits, or for an unreadable file."""
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
