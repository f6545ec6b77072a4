"""The winner's weights and plots, which the workers of a search keep together in the search's folder."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from starling.core.errors import CheckpointError
from starling.core.files.atomic import write_atomic
from starling.core.files.safe_open import is_file, read_file, remove, remove_tree, rename
from starling.model.checkpoint import load_checkpoint
from starling.outputs.run_dir import RunDir
from starling.search.outcome import best_of
from starling.search.storage.journal import folder_locked
from starling.search.study import SearchStudy
from starling.training.reporting import plots
from starling.training.reporting.results import EpochRow
from starling.training.training import TrainingSetup, draw_weights

DRAWN = ".drawn"
"""File that identifies the weights whose plots are complete."""
PLOT = "confusion_matrix.png"
"""One plot of the detections of `weights/best.pt`: if this plot is missing, all have to be drawn."""


def weights_locked(directory: Path) -> AbstractContextManager[None]:
    """Lock the `weights` folder of a search against other workers: its `best.pt` is compared, then replaced."""
    return folder_locked(directory / "weights.lock", RunDir(directory).weights)


def keep_best_weights(directory: Path, run: RunDir, fitness: float) -> None:
    """Keep the weights of the search's best candidate as `weights/best.pt`.

    The candidate's checkpoint stays until the study has the result: without the checkpoint, a worker that is killed or
    refused by a full disk in between would have trained for nothing.
    """
    best = RunDir(directory).best
    with weights_locked(directory):
        if not is_file(best) or fitness > _fitness_of(best):
            rename(run.best, best)
            # The plot shows the earlier weights. File times could not tell: a clock may have been corrected.
            remove(directory / PLOT)


def keep_winners_weights(study: SearchStudy) -> None:
    """Move the winning finalist's weights to `weights/best.pt`, and remove the weights of the other finalists.

    Of the winner's trainings on fresh seeds with weights in this folder, the best is taken.
    """
    finished = study.finished()
    winner = best_of(finished)
    finals = [training for training in finished if training.finalist_of is not None]
    runs = {training.number: RunDir(study.candidate_dir(training.number)) for training in finals}
    mine = [t for t in finals if t.finalist_of == winner.number and is_file(runs[t.number].best)]
    if mine:
        taken = max(mine, key=lambda training: training.fitness)
        # In this order a worker that is killed in between leaves the best weights to the next worker.
        for number, run in runs.items():
            if number != taken.number:
                remove_tree(run.weights)
        remove(study.directory / PLOT)
        rename(runs[taken.number].best, RunDir(study.directory).best)
    for run in runs.values():
        remove_tree(run.weights)


def draw_winner(setup: TrainingSetup, directory: Path) -> None:
    """Draw the plots of the winner's weights, unless another worker has; the caller has locked the weights."""
    best, mark = RunDir(directory).best, directory / DRAWN
    if not is_file(best) or ((directory / PLOT).exists() and _holds(mark, _stamp(best))):
        return
    plots.draw_labels(setup.data.train, directory)
    draw_weights(setup, best, directory)
    # The mark is written last: after a kill before it, all plots are drawn again.
    write_atomic(mark, _stamp(best))


def _stamp(path: Path) -> str:
    """Return a text that identifies a version of a weights file."""
    found = path.stat()
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns}"


def _holds(path: Path, text: str) -> bool:
    return is_file(path) and read_file(path) == text.encode()


def _fitness_of(path: Path) -> float:
    try:
        rows = [EpochRow.from_list(values) for values in load_checkpoint(path)["rows"]]
    except (CheckpointError, LookupError, TypeError, ValueError):
        return float("-inf")
    return max((row.fitness for row in rows if row.validated), default=float("-inf"))
