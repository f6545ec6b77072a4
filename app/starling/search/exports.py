"""Files derived from the study: evolve.csv, hyp_evolve.yaml, evolve.png, report.html. None of them is ever read back."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from starling.config.yaml_reader import write_yaml
from starling.outputs.atomic import write_atomic
from starling.search.outcome import BEST_HYP, METRIC_COLUMNS, Finished, best_of
from starling.search.space_file import settings_flags
from starling.search.storage.journal import locked, locked_if_free
from starling.search.study import SearchStudy

CSV, PICTURE = "evolve.csv", "evolve.png"
LOCK, PICTURE_LOCK = "views.lock", "picture.lock"


def write_files(study: SearchStudy) -> None:
    """Replace evolve.csv and hyp_evolve.yaml; nothing is written before a candidate has finished.

    One worker at a time, each reading the study after it got the turn, so that newer content is never replaced by
    older. Raises OSError where the disk refuses.
    """
    with locked(study.directory / LOCK):
        if finished := study.finished():
            write_atomic(study.directory / CSV, csv_text(finished))
            _write_best(study, finished)


def draw_picture(study: SearchStudy, *, wait: bool = True) -> None:
    """Replace evolve.png; unless `wait`, leave it to the worker that is at it, if one is.

    Under a lock of its own: drawing takes seconds, for which nobody's evolve.csv is to wait.
    """
    lock = study.directory / PICTURE_LOCK
    with ExitStack() as stack:
        if wait:
            stack.enter_context(locked(lock))
        elif not stack.enter_context(locked_if_free(lock)):
            return
        if finished := study.finished():
            _draw(finished, study.directory / PICTURE)
            _report(study)


def csv_text(finished: Sequence[Finished]) -> str:
    """Return evolve.csv: one row a finished training, in order.

    The columns that its readers know come first: seven metrics, every hyperparameter; then settings that are searched.
    """
    names, settings = list(finished[0].hyp), list(finished[0].settings)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*METRIC_COLUMNS.values(), *names, *settings])
    for candidate in finished:
        metrics = [f"{candidate.metrics[name]:.6g}" for name in METRIC_COLUMNS]
        values = [
            *(repr(candidate.hyp[name]) for name in names),
            *(candidate.settings[name] for name in settings),
        ]
        writer.writerow([*metrics, *values])
    return text.getvalue()


def _write_best(study: SearchStudy, finished: Sequence[Finished]) -> None:
    best, progress = best_of(finished), study.progress()
    metrics = "\n".join(f"{column}: {best.metrics[name]:.5g}" for name, column in METRIC_COLUMNS.items())
    again = "".join(f"fitness on a fresh seed: {value:.5g}\n" for value in best.again)
    comment = (
        f"Best of {progress.finished} finished trainings (budget {progress.budget}): candidate {best.number}\n"
        f"fitness: {best.fitness:.5g}\n{again}{metrics}\n"
    )
    if best.settings:
        comment += f"trained with: {settings_flags(best.settings)}\n"
    write_yaml(study.directory / BEST_HYP, best.hyp, comment=comment)


def _report(study: SearchStudy) -> None:
    from starling.search.report import write_report  # as is what it takes the importance of genes from

    write_report(study)


def _draw(finished: Sequence[Finished], path: Path) -> None:
    from starling.plots.search import plot_evolve  # matplotlib is slow to import

    hyps = {name: [candidate.hyp[name] for candidate in finished] for name in finished[0].hyp}
    plot_evolve(hyps, [candidate.fitness for candidate in finished], path)
