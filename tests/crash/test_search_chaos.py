"""A search whose workers are killed, frozen and robbed of their disk loses nothing and does nothing twice."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from starling import settings
from starling.config.yaml_reader import read_yaml
from starling.search.exports import CSV, csv_text
from starling.search.outcome import BEST_HYP, Attempt, State, best_of
from starling.search.storage.journal import JOURNAL, locked
from starling.search.study import SearchStudy
from tests.crash.conftest import PROCESSES, Start
from tests.crash.searchers import BUDGET, EPOCHS, SEED_HYP, Fault, Scene, work

WORKERS = 8
PATIENCE_S = 60.0
"""For anything that is waited for: longer than any of it takes, however busy the machine is."""
DISK_FULL_AT = 0.4
"""Share of the search's epochs."""


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.005)


@dataclass
class Story:
    """A search under attack: who works on it, and what was done to them."""

    scene: Scene
    rng: random.Random
    disk: Path | None
    """The small disk that the search is on; None where mounting one is not allowed."""
    freezes: str
    """When one worker freezes: early, with epochs to go, or late, between the last one and the result."""
    alive: dict[str, ForkServerProcess] = field(default_factory=dict)
    """Workers by name, of whom none has been harmed."""
    ended: dict[str, int] = field(default_factory=dict)
    """Exit codes, negative for signals."""
    killed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    """Workers that met the full disk."""
    started: int = 0

    def start(self, fault: Fault = ()) -> str:
        name = f"w{self.started}"
        self.started += 1
        process = PROCESSES.Process(target=work, args=(self.scene, name, fault))
        process.start()
        self.alive[name] = process
        return name

    def end(self, name: str) -> int:
        """Wait for a worker and return its exit code."""
        process = self.alive[name]
        process.join(PATIENCE_S)
        assert process.exitcode is not None, f"{name} hangs; it said {self.said(name)[-3:]}"
        del self.alive[name]
        self.ended[name] = process.exitcode
        return process.exitcode

    def kill_one_and_replace_it(self, spared: set[str]) -> None:
        victim = self.rng.choice(sorted(self.alive.keys() - spared))
        self.alive[victim].kill()
        # Whoever had ended by itself just before was not harmed.
        if self.end(victim) == -signal.SIGKILL:
            self.killed.append(victim)
        self.start()

    def tear_journal(self) -> None:
        """Leave half a record behind, as a writer that is killed does."""
        with locked(self.scene.search / JOURNAL), (self.scene.search / JOURNAL).open("ab") as journal:
            journal.write(b'{"op_code":6,"worker_id":"torn","trial_id":0,"sta')

    def fill_disk(self) -> None:
        """Fill the search's disk until every worker has given up; make room again."""
        assert self.disk is not None
        filler = self.disk / "filler"
        with filler.open("wb", buffering=0) as file:
            while self.alive:
                with contextlib.suppress(
                    OSError
                ):  # until there is no room, and again after each leftover removed
                    while True:
                        file.write(b"x" * 4096)
                for name in [name for name, process in self.alive.items() if not process.is_alive()]:
                    assert self.end(name) == 6, self.said(name)
                    self.refused.append(name)
                time.sleep(0.005)
        filler.unlink()

    def epochs(self) -> int:
        return len(self.scene.lines("epochs"))

    def said(self, name: str) -> list[str]:
        return [line for line in self.scene.lines("said") if line.startswith(f"{name}: ")]

    def attempts(self) -> list[Attempt]:
        return SearchStudy.read(self.scene.search).attempts()


def play(story: Story) -> None:
    """Attack a search from its first to its last candidate, and let it end."""
    whole = BUDGET * EPOCHS
    story.killed.append(dying := story.start(("die in append", str(story.rng.randrange(4, 9)))))
    while len(story.alive) < WORKERS:
        story.start()
    early = sorted(story.rng.sample(range(10, int(whole * DISK_FULL_AT)), 4))
    for moment in early:
        wait_until(lambda at=moment: story.epochs() >= at, f"epoch {moment}")  # type: ignore[misc]
        story.kill_one_and_replace_it(spared={dying})
    assert story.end(dying) == -signal.SIGKILL
    story.tear_journal()
    if story.disk is not None:
        story.fill_disk()
    frozen = story.start(("freeze", story.freezes))
    wait_until(lambda: bool(story.scene.lines("frozen")), "a worker freezes")
    while len(story.alive) < WORKERS:
        story.start()
    late = sorted(story.rng.sample(range(int(whole * 0.5), int(whole * 0.9)), 4))
    for moment in late:
        wait_until(lambda at=moment: story.epochs() >= at, f"epoch {moment}")  # type: ignore[misc]
        story.kill_one_and_replace_it(spared={frozen})
    thaw(story, frozen)
    for name in sorted(story.alive):
        story.end(name)


def thaw(story: Story, name: str) -> None:
    """Wait until a frozen worker's candidate was taken over; then let it go on."""
    number = frozen_at(story)[0]
    wait_until(lambda: story.attempts()[number].state is State.LOST, "a takeover")
    os.kill(story.alive[name].pid or 0, signal.SIGCONT)


def frozen_at(story: Story) -> tuple[int, int]:
    """Return candidate and epoch at which a worker froze."""
    (line,) = story.scene.lines("frozen")
    number, epoch = map(int, line.split())
    return number, epoch


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Path | None]]:
    """Return a function that mounts a disk of 16 MiB, or says None where that is not allowed."""
    mounted: list[Path] = []

    def mount() -> Path | None:
        folder = tmp_path_factory.mktemp("disk")
        command = ["mount", "-t", "tmpfs", "-o", "size=16m", "starling-test", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module", params=[(1, "early"), (2, "late")])
def story(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    small_disk: Callable[[], Path | None],
) -> Iterator[Story]:
    """Return a search that has been through all of it."""
    PROCESSES.set_forkserver_preload(["starling.search.training", "tests.crash.children"])
    notes, disk = tmp_path_factory.mktemp("notes"), small_disk()
    scene = Scene((disk or tmp_path_factory.mktemp("search")) / "search", notes)
    seed, freezes = request.param
    told = Story(scene, random.Random(seed), disk, freezes)
    try:
        play(told)
        yield told
    finally:
        for process in told.alive.values():
            process.kill()
            process.join()


def test_a_third_of_the_workers_was_killed_and_nobody_else_ended_badly(story: Story) -> None:
    assert len(story.killed) >= story.started / 3
    expected = dict.fromkeys(story.ended, 0)
    expected |= dict.fromkeys(story.killed, -signal.SIGKILL) | dict.fromkeys(story.refused, 6)
    assert story.ended == expected
    assert bool(story.refused) == (story.disk is not None)
    assert story.alive == {}


def test_the_budget_is_met_exactly_and_nothing_is_left_open(story: Story) -> None:
    progress = SearchStudy.read(story.scene.search).progress()
    assert (progress.finished, progress.running, progress.budget) == (BUDGET, 0, BUDGET)


def test_no_finished_candidate_is_lost_or_doubled(story: Story) -> None:
    finished = [attempt for attempt in story.attempts() if attempt.state is State.FINISHED]
    recorded = [int(line) for line in story.scene.lines("recorded")]
    assert len(set(recorded)) == len(recorded)
    unsaid = {attempt.number for attempt in finished} - set(recorded)
    assert set(recorded) <= {attempt.number for attempt in finished}
    assert len(unsaid) <= len(story.killed), "killed between the record and the word about it"
    assert len({attempt.root for attempt in finished}) == BUDGET


def test_every_hyp_is_trained_once_and_the_seeds_first(story: Story) -> None:
    attempts = story.attempts()
    hyps = {attempt.root: tuple(attempt.hyp.values()) for attempt in attempts}
    assert len(set(hyps.values())) == len(hyps), "two candidates with the same hyp"
    assert all(tuple(a.hyp.values()) == hyps[a.root] for a in attempts)
    assert attempts[0].hyp == SEED_HYP
    assert [root for root, hyp in hyps.items() if hyp == tuple(SEED_HYP.values())] == [0]


def test_at_most_one_epoch_is_redone_for_each_interruption(story: Story) -> None:
    trained = epochs_trained(story.scene)
    for chain in lineages(story.attempts()):
        assert_at_most_one_is_redone(chain, trained, EPOCHS)


def assert_at_most_one_is_redone(chain: list[Attempt], trained: dict[int, list[int]], epochs: int) -> None:
    """Assert that each attempt at a candidate went on where the one before was, or an epoch earlier."""
    begun = 0
    for attempt in chain:
        here = trained.get(attempt.number, [])
        if here:
            assert here == list(range(here[0], here[-1] + 1))
            assert here[0] in (begun, begun - 1), (
                f"attempt {attempt.number} began at epoch {here[0]} of {begun}"
            )
            begun = here[-1] + 1
    if chain[-1].state is State.FINISHED:
        assert begun == epochs
    else:
        assert len(chain) == 3, "given up although it could have been tried again"


def epochs_trained(scene: Scene) -> dict[int, list[int]]:
    """Return the epochs that were begun in each attempt."""
    trained: dict[int, list[int]] = {}
    for number, epoch in (map(int, line.split()) for line in scene.lines("epochs")):
        trained.setdefault(number, []).append(epoch)
    return trained


def lineages(attempts: list[Attempt]) -> list[list[Attempt]]:
    """Return the attempts at each candidate, in their order."""
    chains: dict[int, list[Attempt]] = {}
    for attempt in attempts:
        chains.setdefault(attempt.root, []).append(attempt)
    return list(chains.values())


def test_each_lost_candidate_is_taken_over_by_exactly_one_worker(story: Story) -> None:
    for chain in lineages(story.attempts()):
        *before, last = chain
        assert {attempt.state for attempt in before} <= {State.LOST}
        assert last.state is State.FINISHED or (last.state is State.LOST and len(chain) == 3)
    assert "its worker died" in {attempt.reason for attempt in story.attempts()}, (
        "noticed at once, not by patience"
    )
    interrupted = sum(attempt.state is State.LOST for attempt in story.attempts())
    assert interrupted <= len(story.killed) + len(story.refused) + len(story.scene.lines("frozen"))


def test_the_frozen_worker_abandons_its_candidate_and_works_on(story: Story) -> None:
    number, epoch = frozen_at(story)
    frozen = story.attempts()[number]
    assert frozen.state is State.LOST
    assert "no sign of life" in frozen.reason
    (line,) = [line for line in story.said(frozen.worker) if "abandoned" in line]
    assert f"candidate {number} was taken over" in line
    after = [trained for trained in epochs_trained(story.scene).get(number, []) if trained > epoch]
    assert after == [], "trained on although it had lost its lease"
    assert story.ended[frozen.worker] == 0


def test_every_line_of_the_journal_is_a_record(story: Story) -> None:
    content = (story.scene.search / JOURNAL).read_bytes()
    assert content.endswith(b"\n")
    records = [json.loads(line) for line in content.splitlines()]
    assert all(isinstance(record["op_code"], int) for record in records)
    assert "torn" not in {record["worker_id"] for record in records}
    ended = Counter(record["trial_id"] for record in records if record["op_code"] == 6)
    assert set(ended.values()) == {1}, "a result recorded twice"


def test_the_views_agree_with_the_study(story: Story) -> None:
    finished = SearchStudy.read(story.scene.search).finished()
    assert (story.scene.search / CSV).read_text() == csv_text(finished)
    assert read_yaml(story.scene.search / BEST_HYP) == best_of(finished).hyp


def test_real_trainings_that_are_killed_at_random_go_on_and_end_as_if_nobody_had_touched_them(
    start: Start, tiny_args: list[str], runs: Path, tmp_path: Path
) -> None:
    settings.update({"mlflow": False, "tensorboard": False})
    epochs, budget, rng = 12, 2, random.Random(0)
    search = [*tiny_args, "--epochs", str(epochs), "--project", "blood"]
    fault = ("noted_epochs", str(tmp_path))
    left_alone = start([*search, "--evolve", "1", "--name", "alone"], ("noted_epochs", str(runs)))
    attacked = [*search, "--evolve", str(budget), "--name", "attacked"]
    scene = Scene(runs / "blood" / "attacked", tmp_path)
    workers = [start(attacked, fault) for _ in range(2)]
    killed = 0
    for _ in range(2):  # a third might be the end of one
        enough = len(scene.lines("pids")) + rng.randint(1, 4)
        wait_until(lambda at=enough: len(scene.lines("pids")) >= at, "an epoch")  # type: ignore[misc]
        time.sleep(rng.random() * 0.05)  # not to hit only the beginnings of epochs
        # Whoever began an epoch last is in the middle of a training.
        victim = next(worker for worker in workers if str(worker.process.pid) == scene.lines("pids")[-1])
        workers.remove(victim)
        victim.send(signal.SIGKILL)
        killed += victim.wait() == -signal.SIGKILL
        workers.append(start(attacked, fault))
    assert [worker.wait() for worker in (left_alone, *workers)] == [0] * 3, workers[-1].output
    study, reference = (SearchStudy.read(runs / "blood" / name) for name in ("attacked", "alone"))
    progress, chains = study.progress(), lineages(study.attempts())
    assert (progress.finished, progress.running) == (budget, 0)
    assert 1 <= sum(len(chain) - 1 for chain in chains) <= killed
    for chain in chains:
        assert_at_most_one_is_redone(chain, epochs_trained(scene), epochs)
    # Bit for bit: on a CPU a resumed training is the one that was never interrupted.
    seeds = [next(f for f in each.finished() if f.is_seed) for each in (study, reference)]
    assert dict(seeds[0].metrics) == dict(seeds[1].metrics)
    assert (scene.search / CSV).read_text() == csv_text(study.finished())


def test_a_real_training_that_is_frozen_is_taken_over_and_abandoned_when_thawed(
    start: Start, tiny_args: list[str], runs: Path, tmp_path: Path
) -> None:
    settings.update({"mlflow": False, "tensorboard": False})
    search = [*tiny_args, "--epochs", "4", "--project", "blood", "--name", "search", "--evolve", "1"]
    fault = ("noted_epochs", str(tmp_path), "2")
    scene = Scene(runs / "blood" / "search", tmp_path)
    frozen = start(search, fault)
    wait_until(lambda: len(scene.lines("epochs")) >= 2, "the second epoch")
    frozen.send(signal.SIGSTOP)
    thief = start(search, fault)
    assert thief.wait() == 0, thief.output
    frozen.send(signal.SIGCONT)
    assert frozen.wait() == 0, frozen.output
    assert "candidate 0 was taken over by another worker; abandoned here" in frozen.output
    attempts = SearchStudy.read(scene.search).attempts()
    assert [attempt.state for attempt in attempts] == [State.LOST, State.FINISHED]
    assert_at_most_one_is_redone(attempts, epochs_trained(scene), 4)
