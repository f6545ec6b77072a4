"""Files derived from the study: evolve.csv, hyp_evolve.yaml, evolve.png, report.html. Nothing reads them back."""

from __future__ import annotations

import csv
import io
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from starling.config.yaml_reader import write_yaml
from starling.core.files.atomic import write_atomic
from starling.core.files.refusals import refusal
from starling.search.outcome import BEST_HYP, Finished, best_of
from starling.search.space import settings_flags
from starling.search.storage.journal import locked, locked_if_free
from starling.search.study import SearchStudy

logger = logging.getLogger(__name__)

CSV, PLOT = "evolve.csv", "evolve.png"
LOCK, PLOT_LOCK = "views.lock", "picture.lock"
_SCORES = {
    "precision": "metrics/precision",
    "recall": "metrics/recall",
    "map50": "metrics/mAP_0.5",
    "map5095": "metrics/mAP_0.5:0.95",
}
METRIC_COLUMNS = {
    **_SCORES,
    "box_loss": "val/box_loss",
    "obj_loss": "val/obj_loss",
    "cls_loss": "val/cls_loss",
}
"""Metric of an outcome to column of evolve.csv, in the file's order, for a layout with anchors."""
ANCHOR_FREE_COLUMNS = {
    **_SCORES,
    "box_loss": "val/box_loss",
    "cls_loss": "val/cls_loss",
    "dfl_loss": "val/dfl_loss",
}
"""The same for an anchor-free layout."""
FILES_SHARE = 0.005
"""Maximum share of a worker's time for writing evolve.csv and hyp_evolve.yaml, which grow with the study."""
DRAWING_SHARE = 0.02
"""Maximum share of one worker's time that drawing evolve.png and report.html may take, summed over all workers."""
DRAWING_S = 1.5
"""Assumed seconds of a drawing, until a drawing takes longer."""


def write_files(study: SearchStudy) -> None:
    """Replace evolve.csv and hyp_evolve.yaml; nothing is written before the first candidate has finished.

    One worker writes at a time, and reads the study after it got the lock, so that older content never replaces
    newer content. Raises OSError if the disk refuses.
    """
    with locked(study.directory / LOCK):
        if finished := study.finished():
            write_atomic(study.directory / CSV, csv_text(finished))
            _write_best(study, finished)


def draw_plot(study: SearchStudy, *, wait: bool = True) -> None:
    """Replace evolve.png and report.html; without `wait`, do nothing if another worker is drawing them.

    Drawing has its own lock, because it takes seconds and must not delay the evolve.csv of other workers.
    """
    lock = study.directory / PLOT_LOCK
    with ExitStack() as stack:
        if wait:
            stack.enter_context(locked(lock))
        elif not stack.enter_context(locked_if_free(lock)):
            return
        if finished := study.finished():
            from starling.plots.search import plot_evolve  # matplotlib is slow to import
            from starling.search.report import (
                write_report,  # slow too, by the library for the importance of genes
            )

            hyps = {name: [candidate.hyp[name] for candidate in finished] for name in finished[0].hyp}
            fitness = [candidate.fitness for candidate in finished]
            plot_evolve(hyps, fitness, study.directory / PLOT)
            write_report(study)


def csv_text(finished: Sequence[Finished]) -> str:
    """Return evolve.csv: one row per finished training, in the order of the candidates' numbers.

    The standard columns come first: seven metrics, every hyperparameter; searched settings follow.
    """
    names, settings = list(finished[0].hyp), list(finished[0].settings)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = columns_of(finished[0])
    writer.writerow([*columns.values(), *names, *settings])
    for candidate in finished:
        metrics = [f"{candidate.metrics.get(name, math.nan):.6g}" for name in columns]
        values = [
            *(repr(candidate.hyp[name]) for name in names),
            *(candidate.settings[name] for name in settings),
        ]
        writer.writerow([*metrics, *values])
    return text.getvalue()


def metrics_of(candidate: Finished) -> dict[str, float]:
    """Return the metrics that evolve.csv has columns for; NaN where nobody measured or kept one."""
    return {name: candidate.metrics.get(name, math.nan) for name in columns_of(candidate)}


def columns_of(candidate: Finished) -> dict[str, str]:
    """Return the metrics that evolve.csv has columns for, by the parts of the candidate's loss."""
    return ANCHOR_FREE_COLUMNS if "dfl_loss" in candidate.metrics else METRIC_COLUMNS


def _write_best(study: SearchStudy, finished: Sequence[Finished]) -> None:
    best, progress = best_of(finished), study.progress()
    columns = columns_of(best)
    metrics = "\n".join(f"{columns[name]}: {value:.5g}" for name, value in metrics_of(best).items())
    again = "".join(f"fitness on a fresh seed: {value:.5g}\n" for value in best.again)
    comment = (
        f"Best of {progress.finished} finished trainings (budget {progress.budget}): candidate {best.number}\n"
        f"fitness: {best.fitness:.5g}\n{again}{metrics}\n"
    )
    if best.settings:
        comment += f"trained with: {settings_flags(best.settings)}\n"
    write_yaml(study.directory / BEST_HYP, best.hyp, comment=comment)


class Exports:
    """The derived files, which one worker keeps up to date within a share of its time.

    After short trainings of a large study, writing the files would take most of the time, and so would evolve.png. The
    files then wait for a later training, or for the last one. They only show the study, so a failure costs one line.
    """

    def __init__(self, study: SearchStudy, *, draws: bool) -> None:
        self._study, self._draws = study, draws
        self._files_are_behind = False
        self._files_due = self._drawing_due = 0.0
        """Earliest times on the monotonic clock to write the files and to draw the plot again."""
        self._plot: int | None = None
        """Modification time of evolve.png at this worker's last look; compared only with later looks."""
        self._drawing_s = DRAWING_S
        """Seconds of the longest drawing so far."""
        self._was_drawn()  # the first drawing has to wait too
        self._said: set[str] = set()
        """Reasons for unwritten files that this worker has already printed."""

    def refresh(self, *, last: bool = False) -> None:
        """Write the files that are due; with `last`, write all of them."""
        self._files_are_behind = True
        if last or time.monotonic() >= self._files_due:
            self.catch_up()
        if self._draws and (last or self._plot_is_due()):
            took = self._timed(lambda: draw_plot(self._study, wait=last))
            self._drawing_s = max(self._drawing_s, took)
            self._was_drawn()
            self._plot = self._plot_mark()

    def catch_up(self) -> None:
        """Write the files that `refresh` has postponed."""
        if self._files_are_behind:
            self._files_are_behind = False
            took = self._timed(lambda: write_files(self._study))
            self._files_due = time.monotonic() + took / FILES_SHARE

    def _plot_is_due(self) -> bool:
        """Return whether it is time to draw; a drawing by another worker counts as a drawing by this worker."""
        mark = self._plot_mark()
        if mark != self._plot:
            self._plot = mark
            self._was_drawn()
        return time.monotonic() >= self._drawing_due

    def _was_drawn(self) -> None:
        self._drawing_due = time.monotonic() + self._drawing_s / DRAWING_SHARE

    def _plot_mark(self) -> int | None:
        try:
            return (self._study.directory / PLOT).stat().st_mtime_ns
        except OSError:
            return None

    def _timed(self, write: Callable[[], None]) -> float:
        """Return the seconds that writing took; print the reason of a failure, each reason once."""
        began = time.monotonic()
        try:
            write()
        except Exception as error:
            reason = str((isinstance(error, OSError) and refusal(error)) or error)
            if reason not in self._said:
                self._said.add(reason)
                logger.warning(f"{self._study.directory}: evolve files are behind the study: {reason}")
        return time.monotonic() - began
