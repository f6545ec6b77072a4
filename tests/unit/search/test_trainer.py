"""A search trains whatever a `CandidateTrainer` trains: here a parabola, without torch, a dataset or a command line."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest

from starling.cli.search import main
from starling.search.exports import CSV, PLOT
from starling.search.outcome import Candidate, Outcome, Report, State
from starling.search.report import REPORT
from starling.search.space import Gene, SettingGene, Space
from starling.search.spec import StudyPlan, StudySpec
from starling.search.study import SearchStudy
from starling.search.worker import CandidateTrainer, Worker, WorkerSettings
from tests.waiting import wait_until

EPOCHS, BUDGET = 6, 30
SPEC = StudySpec(
    hyp={"x": 0.0, "y": 0.0},
    space=Space((Gene("x", 1, -5, 5), Gene("y", 1, -5, 5)), (SettingGene("bend", (1, 2)),)),
    settings={"bend": 1},
    budget=BUDGET,
    plan=StudyPlan(epochs=EPOCHS, finalists=2),
)
PROCESSES = multiprocessing.get_context("spawn")


class Parabola(CandidateTrainer):
    """Fitness is 1 at x = 3, y = -1, and falls with the distance."""

    def train(self, candidate: Candidate, report: Report) -> Outcome:
        """Approach the fitness in some steps."""
        away = abs(candidate.hyp["x"] - 3) + abs(candidate.hyp["y"] + 1)
        fitness = 1 / (1 + away ** int(candidate.settings["bend"]))
        for epoch in range(1, EPOCHS):
            self.step(candidate.number)
            report(epoch, fitness * epoch / EPOCHS)
        return Outcome(fitness=fitness, metrics={"map50": fitness, "away": away})

    def step(self, number: int) -> None:
        """Do what takes the time of an epoch."""


class Victim(Parabola):
    """Is killed in the middle of a training, once others have had theirs."""

    def __init__(self, grave: Path) -> None:
        self._grave = grave

    def step(self, number: int) -> None:
        """Die."""
        if number >= 5:
            self._grave.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Survivor(Parabola):
    """Leaves trainings to the victim, however late its process starts."""

    def __init__(self, grave: Path) -> None:
        self._grave = grave

    def step(self, number: int) -> None:
        """Wait for the victim's end in the middle of the search."""
        if number >= 8:
            wait_until(self._grave.exists)


def work(directory: Path, trainer: CandidateTrainer, name: str) -> None:
    """Be a worker of the search."""
    study = SearchStudy.open_or_create(directory, SPEC)
    settings = WorkerSettings(name=name, poll_s=0.02, plot=False)
    summary = Worker(study, trainer, settings=settings).run()
    assert summary.best.fitness >= (summary.seed_fitness or 0.0)
    assert not {"torch", "starling.training", "starling.model", "starling.data"} & sys.modules.keys()


def test_a_search_with_a_trainer_of_ten_lines_meets_its_budget_exactly_though_a_worker_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grave = tmp_path / "grave"
    workers = [
        PROCESSES.Process(target=work, args=(tmp_path / "study", trainer, name))
        for trainer, name in ((Victim(grave), "victim"), (Survivor(grave), "other"))
    ]
    for process in workers:
        process.start()
    workers[0].join(60)
    assert workers[0].exitcode == -signal.SIGKILL
    workers[1].join(60)
    assert workers[1].exitcode == 0
    study = SearchStudy.read(tmp_path / "study")
    finished, attempts = study.finished(), study.attempts()
    assert (study.progress().finished, study.progress().failed, len(finished)) == (BUDGET, 0, BUDGET)
    [lost] = [attempt for attempt in attempts if attempt.state is State.LOST]
    assert lost.worker == "victim"
    [taken_over] = [attempt for attempt in attempts if attempt.root == lost.number != attempt.number]
    assert (taken_over.state, taken_over.worker) == (State.FINISHED, "other")
    assert taken_over.curve == {epoch: pytest.approx(taken_over.fitness * epoch / EPOCHS) for epoch in range(1, EPOCHS)}  # type: ignore[operator]  # fmt: skip
    assert finished[0].is_seed
    assert (finished[0].hyp, finished[0].settings) == ({"x": 0.0, "y": 0.0}, {"bend": 1})
    assert sum(candidate.finalist_of is not None for candidate in finished) == 4
    assert main(["show", str(tmp_path / "study"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["progress"]["finished"] == BUDGET
    assert shown["best"]["fitness"] > finished[0].fitness, "the search has found something"


def test_what_such_a_trainer_measures_is_in_the_exports_and_what_it_does_not_is_nan(tmp_path: Path) -> None:
    study = SearchStudy.open_or_create(tmp_path, SPEC)
    Worker(study, Parabola(), settings=WorkerSettings(name="w")).run()
    with (tmp_path / CSV).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == BUDGET
    for row, candidate in zip(rows, study.finished(), strict=True):
        assert (float(row["x"]), row["bend"]) == (candidate.hyp["x"], str(candidate.settings["bend"]))
        assert (row["metrics/mAP_0.5"], row["metrics/precision"]) == (f"{candidate.fitness:.6g}", "nan")
    assert (tmp_path / PLOT).is_file()
    assert "Search" in (tmp_path / REPORT).read_text()
