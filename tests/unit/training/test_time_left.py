"""No time left is told before the second epoch: the first one also loads, compiles and fills caches."""

from __future__ import annotations

import io
import json
from datetime import datetime, timedelta
from pathlib import Path

from launcher.status.progress import read_progress
from starling.core.worker_status import WorkerStatus
from starling.progress import Progress, on_console
from starling.search.outcome import SearchProgress, State
from starling.training.reporting.reporter import Reporter, RunLabel
from starling.training.reporting.results import EpochRow
from tests.unit.search.search_pages import attempt, time_left

NAN = float("nan")


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def row(epoch: int) -> EpochRow:
    return EpochRow(epoch, (1.0, 1.0, 1.0), (0.5, 0.5, 0.5, 0.5), (NAN, NAN, NAN), (0.1, 0.1, 0.1))


def test_the_time_left_is_told_from_the_second_epoch_on_and_without_the_first(tmp_path: Path) -> None:
    clock, out = Clock(), io.StringIO()
    progress = Progress(out, clock=clock)
    status = WorkerStatus(tmp_path, "w")
    reporter = Reporter(RunLabel("u", "p", "n"), tmp_path, progress=progress, status=status, clock=clock)
    told: list[float | None] = []

    def train(epoch: int, seconds: float, validation: float) -> None:
        reporter.epoch_began()
        for done in range(1, 5):
            clock.now += seconds / 4
            reporter.iteration(epoch, 10, done, 4, done * 8, lambda: {"box": 1.0, "obj": 1.0, "cls": 1.0})
            told.append(json.loads(status.path.read_text())["eta_s"])
        clock.now += validation
        reporter.epoch_ended(row(epoch), 10, 32, True)
        told.append(json.loads(status.path.read_text())["eta_s"])

    train(0, 300, 30)  # kernels are chosen and images decoded in the first
    assert told == [None] * 5
    assert "left" not in out.getvalue()
    assert read_progress(tmp_path, "w").eta_s is None
    told.clear()
    with on_console(progress):
        train(1, 40, 10)
    assert told[0] == 30 + 30 + 8 * (40 + 30), "by its own pace, and a validation like the last one"
    assert told[-1] == 8 * 50
    assert "left 6m40s" in out.getvalue()


def test_a_search_tells_no_end_before_a_whole_training_was_trained() -> None:
    began = datetime(2026, 1, 1)
    minute = timedelta(seconds=60)
    pruned = attempt(0, state=State.PRUNED, began=began, ended=began + minute, epochs=1)
    running = attempt(1, state=State.RUNNING, began=began, ended=None)
    progress = SearchProgress(
        budget=10, finished=0, running=1, failed=0, best_fitness=None, pruned=1, part_trained=1 / 30
    )
    assert time_left([pruned, running], progress, began + timedelta(seconds=70)) is None
