"""A pruned search with finalists whose workers die at any moment spends its budget exactly, on the right trainings."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from starling.config.hyp import Hyp
from starling.errors import Pruned
from starling.search.outcome import State
from starling.search.spec import FRESH_SEEDS, StudyPlan
from starling.search.storage.journal import SafeJournalBackend
from starling.search.study import LeasedCandidate, SearchStudy, Turn
from tests.searches import outcome, spec

SEED = Hyp().as_dict()
EPOCHS, BUDGET, FINALISTS, WORKERS = 5, 20, 2, 4
ALIVE = 12
"""Steps of a worker between two deaths, at the least, so that work gets done."""


class Killed(BaseException):
    """A worker is gone in the middle of what it did."""


@dataclass
class World:
    """Workers of one search, taken on by turns in one process; each may die at any write to the study."""

    directory: Path
    rng: random.Random
    deaths: float
    """Probability that a write to the study is a worker's last act."""
    aim: str
    """`anybody`, or `finals`: whoever trains a finalist again dies more often."""
    studies: dict[int, SearchStudy] = field(default_factory=dict)
    claims: dict[int, tuple[LeasedCandidate, int] | None] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    killed: int = 0
    peaceful: bool = True

    def join(self) -> SearchStudy:
        plan = StudyPlan(epochs=EPOCHS, prune=True, finalists=FINALISTS)
        return SearchStudy.open_or_create(
            self.directory, spec(SEED, BUDGET, seed=7, plan=plan, sampler="random")
        )

    def play(self) -> None:
        """Let the workers work, and die, until all of them have heard that the search is over."""
        for turn in range(20_000):
            self.peaceful = turn > 1_500
            worker = self.rng.randrange(WORKERS)
            if worker in self.done:
                if len(self.done) == WORKERS:
                    return
                continue
            try:
                self.step(worker)
            except Killed:
                self.bury(worker)
        pytest.fail("the search has no end")

    def step(self, worker: int) -> None:
        """Let a worker ask, train an epoch, or die."""
        study = self.studies.get(worker)
        if study is None:
            self.studies[worker] = self.join()
            return
        held = self.claims.get(worker)
        if held is None:
            turn = study.ask(f"w{worker}")
            if isinstance(turn, LeasedCandidate):
                self.claims[worker] = (turn, 0)
            elif turn is Turn.DONE:
                self.done.add(worker)
            return
        mine, epoch = held
        final = mine.candidate.finalist_of is not None
        chance = self.deaths * (4 if final else 0.2) if self.aim == "finals" else self.deaths
        if not self.peaceful and self.rng.random() < chance:
            raise Killed
        self.train(study, worker, mine, epoch + 1)

    def train(self, study: SearchStudy, worker: int, mine: LeasedCandidate, epoch: int) -> None:
        quality = 1 - abs(mine.candidate.hyp["lr0"] - 0.02) * 10
        self.claims[worker] = (mine, epoch)
        try:
            if epoch in mine.candidate.glances:
                study.report(mine, epoch, quality * epoch / EPOCHS)
        except Pruned as pruned:
            study.prune(mine, pruned)
            self.claims[worker] = None
            return
        if epoch == EPOCHS:
            study.finish(mine, outcome(quality))
            self.claims[worker] = None

    def bury(self, worker: int) -> None:
        """Let go of all that the worker held, as the kernel does; another one comes in its place."""
        self.killed += 1
        held = self.claims.pop(worker, None)
        if held is not None:
            held[0].lease.abandon()
        self.studies.pop(worker, None)


@pytest.fixture
def mortal(monkeypatch: pytest.MonkeyPatch) -> list[World]:
    """Make each write to a study deadly by chance, before or after it; gives back where the world is to be put."""
    worlds: list[World] = []
    whole = SafeJournalBackend.append_logs
    monkeypatch.setattr("starling.search.storage.journal.os.fsync", lambda descriptor: None)

    def append(self: SafeJournalBackend, logs: list[dict[str, Any]]) -> None:
        world = worlds[-1]
        fate = 1.0 if world.peaceful or not world.studies else world.rng.random()
        if fate < world.deaths / 4:
            raise Killed
        whole(self, logs)
        if fate < world.deaths / 2:
            raise Killed

    monkeypatch.setattr(SafeJournalBackend, "append_logs", append)
    return worlds


@pytest.mark.parametrize("aim", ["anybody", "finals"])
def test_each_finalist_gets_its_repetitions_whichever_worker_dies(
    tmp_path: Path, mortal: list[World], aim: str
) -> None:
    killed = 0
    for seed in range(6):
        world = World(tmp_path / str(seed), random.Random(seed), deaths=0.1, aim=aim)
        mortal.append(world)
        world.play()
        world.peaceful = True
        killed += world.killed
        assert_exact(SearchStudy.read(world.directory), f"seed {seed}, {world.killed} killed")
    assert killed > 30


def assert_exact(study: SearchStudy, what: str) -> None:
    attempts, progress = study.attempts(), study.progress()
    finals = [a for a in attempts if a.finalist_of is not None]
    finished = Counter(a.finalist_of for a in finals if a.state is State.FINISHED)
    ranked = sorted(
        (f for f in study.finished() if f.finalist_of is None), key=lambda f: (-f.fitness, f.number)
    )
    assert finished == {f.number: FRESH_SEEDS for f in ranked[:FINALISTS]}, what
    assert progress.running == 0, what
    assert BUDGET - 1 < progress.spent <= BUDGET, what
    ended = [a.root for a in attempts if a.state in (State.FINISHED, State.PRUNED)]
    assert len(set(ended)) == len(ended), f"{what}: something was done twice"
