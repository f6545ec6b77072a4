"""What a search needs of the place where its study lives; every storage passes the same tests.

A storage joins by its name in STORAGES and what `place` does for it; it is opened again and again, as workers do.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from starling.config.hyp import Hyp
from starling.core.errors import UsageError
from starling.errors import Pruned
from starling.search import spec as specs
from starling.search.outcome import LeaseLost, State
from starling.search.spec import StudyPlan, StudyRules
from starling.search.storage.leases import Lease
from starling.search.storage.storage import StudyStorage, open_storage
from starling.search.study import LeasedCandidate, SearchStudy, Turn
from tests.searches import outcome, spec

STORAGES = ("journal", "postgresql")
SEED = Hyp().as_dict()
OUTCOME = outcome(0.25)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["starling.search.study"])


@dataclass(frozen=True)
class Place:
    """Where a test's study lives; processes of their own get a copy."""

    url: str = ""
    password: str = ""

    def open(self, directory: Path) -> StudyStorage:
        """Open the storage once more."""
        return open_storage(self.url, directory, environment={"PGPASSWORD": self.password})


@pytest.fixture(params=STORAGES)
def place(request: pytest.FixtureRequest) -> Place:
    """Return an empty place of each kind."""
    if request.param == "journal":
        return Place()
    return Place(request.getfixturevalue("database"), request.getfixturevalue("postgres").password)


def join(
    place: Place, directory: Path, budget: int = 3, lease_s: float = 60.0, plan: StudyPlan | None = None
) -> SearchStudy:
    """Open the study as one more worker."""
    return SearchStudy.open_or_create(
        directory,
        spec(SEED, budget, signature={"data": "d1"}, plan=plan or StudyPlan()),
        storage=place.open(directory),
        rules=StudyRules(lease_s=lease_s),
    )


def claim(study: SearchStudy, worker: str = "w") -> LeasedCandidate:
    """LeasedCandidate a candidate that must be there."""
    turn = study.ask(worker)
    assert isinstance(turn, LeasedCandidate)
    return turn


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def take(storage: StudyStorage, number: int = 7) -> Lease:
    """Take a candidate's lease as a worker does."""
    with storage.lock():
        return storage.take_lease(number, "w")


class Observer:
    """Another worker, whose time the test moves."""

    def __init__(self, place: Place, directory: Path, lease_s: float) -> None:
        self.clock = Clock()
        self._storage = place.open(directory)
        self._watch = self._storage.watch(lease_s, self.clock)

    def verdict(self, after_s: float = 0.0) -> str | None:
        """Return what it thinks of the holder of candidate 7 so much later."""
        self.clock.now += after_s
        with self._storage.lock():
            return self._watch.verdict(7)

    def revoke(self) -> None:
        """Take candidate 7 over."""
        with self._storage.lock():
            self._watch.revoke(7)


def hold_lease(place: Place, directory: Path, every_s: float) -> None:
    """Hold candidate 7's lease in a process of its own until it is lost."""
    lease = take(place.open(directory))
    lease.keep_alive(every_s)
    try:
        for beats in itertools.count():
            lease.renew()
            (directory / "beats").write_text(str(beats))
            time.sleep(0.01)
    except LeaseLost:
        (directory / "lost").touch()


def wait_for(path: Path) -> None:
    """Wait until a file is there."""
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, f"{path.name} does not come"
        time.sleep(0.01)


def wait_for_beats(directory: Path) -> None:
    """Wait until the holder has shown anew that it is alive."""
    seen = {(directory / "beats").read_text()}
    until = time.monotonic() + 60
    while len(seen) < 4:
        assert time.monotonic() < until, "the holder is silent"
        time.sleep(0.01)
        seen.add((directory / "beats").read_text())


def start_holder(place: Place, directory: Path) -> multiprocessing.process.BaseProcess:
    """Start a process that holds candidate 7's lease."""
    holder = PROCESSES.Process(target=hold_lease, args=(place, directory, 0.05))
    holder.start()
    wait_for(directory / "beats")
    return holder


def test_killed_holder_is_noticed_long_before_its_lease_is_over(place: Place, tmp_path: Path) -> None:
    holder = start_holder(place, tmp_path)
    observer = Observer(place, tmp_path, lease_s=10_000)
    assert observer.verdict() is None
    holder.kill()
    holder.join()
    observer.verdict()  # sees the last beat
    until = time.monotonic() + 30  # the server needs a moment to see that its client is gone
    while (verdict := observer.verdict(after_s=15)) is None:
        assert time.monotonic() < until
    assert verdict == "its worker died"
    assert observer.clock.now < 1000 + 5_000


def test_living_holder_is_never_judged_gone_however_long_it_trains(place: Place, tmp_path: Path) -> None:
    holder = start_holder(place, tmp_path)
    observer = Observer(place, tmp_path, lease_s=100)
    for _ in range(5):
        assert observer.verdict(after_s=90) is None
        wait_for_beats(tmp_path)
    holder.kill()
    holder.join()


def test_frozen_holder_is_gone_after_its_lease_and_gives_up_when_thawed(place: Place, tmp_path: Path) -> None:
    holder = start_holder(place, tmp_path)
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGSTOP)
    time.sleep(0.2)  # what it was saying when it was stopped arrives
    observer = Observer(place, tmp_path, lease_s=100)
    assert observer.verdict() is None
    assert observer.verdict(after_s=99) is None
    assert "no sign of life for 100 s" in str(observer.verdict(after_s=2))
    observer.revoke()
    os.kill(holder.pid, signal.SIGCONT)
    holder.join(30)
    assert holder.exitcode == 0
    assert (tmp_path / "lost").exists()


def test_abandoned_lease_is_free_at_once_and_a_closed_one_leaves_nothing(
    place: Place, tmp_path: Path
) -> None:
    storage, observer = place.open(tmp_path), Observer(place, tmp_path, lease_s=100)
    take(storage).abandon()
    assert observer.verdict() == "its worker died"
    take(storage).close()
    assert observer.verdict() is None
    assert "no sign of life" in str(observer.verdict(after_s=101))


def test_loser_learns_of_it_and_does_not_remove_the_lease_of_another(place: Place, tmp_path: Path) -> None:
    storage, observer = place.open(tmp_path), Observer(place, tmp_path, lease_s=100)
    loser = take(storage)
    loser.renew()
    observer.revoke()
    winner = take(storage)
    with pytest.raises(LeaseLost, match="candidate 7"):
        loser.renew()
    loser.close()
    winner.renew()
    winner.close()
    with pytest.raises(LeaseLost):
        winner.renew()


def test_candidate_of_a_killed_worker_is_trained_once_more_by_one_of_many(
    place: Place, tmp_path: Path
) -> None:
    holder = PROCESSES.Process(target=claim_and_die, args=(place, tmp_path))
    holder.start()
    holder.join(30)
    assert holder.exitcode == -signal.SIGKILL
    workers = [PROCESSES.Process(target=join_and_train, args=(place, tmp_path, 1.0)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(90)
    assert [worker.exitcode for worker in workers] == [0] * 3
    attempts = join(place, tmp_path).attempts()
    assert sorted(a.state for a in attempts) == [State.FINISHED] * 12 + [State.LOST]
    assert [a.root for a in attempts if a.state is State.FINISHED].count(0) == 1


def claim_and_die(place: Place, directory: Path) -> None:
    """Die with a claimed candidate."""
    claim(join(place, directory, budget=12))
    os.kill(os.getpid(), signal.SIGKILL)


def test_two_handles_see_one_study(place: Place, tmp_path: Path) -> None:
    first, second = join(place, tmp_path), join(place, tmp_path)
    assert first.uuid == second.uuid != ""
    mine, other = claim(first), claim(second)
    assert (mine.candidate.number, other.candidate.number) == (0, 1)
    first.finish(mine, OUTCOME)
    assert [(c.number, c.fitness, dict(c.metrics)) for c in second.finished()] == [(0, 0.25, OUTCOME.metrics)]
    second.finish(other, OUTCOME)
    assert first.progress() == second.progress()


def test_finished_and_running_never_exceed_the_budget(place: Place, tmp_path: Path) -> None:
    study = join(place, tmp_path, budget=2)
    claims = [claim(study), claim(study)]
    assert study.ask("w") is Turn.WAIT
    study.finish(claims[0], OUTCOME)
    assert study.ask("w") is Turn.WAIT
    study.finish(claims[1], OUTCOME)
    assert study.ask("w") is Turn.DONE


def test_numbers_values_and_attributes_come_back_as_they_went_in(place: Place, tmp_path: Path) -> None:
    study = join(place, tmp_path)
    taken = [claim(study).candidate for _ in range(3)]
    for number, candidate in enumerate(taken):
        trial = study._trials()[number]
        assert {**SEED, **trial.params} == candidate.hyp
        assert trial.user_attrs == {"worker": "w", "root": number, "sampler": "fast" if number else "seed"}
        assert trial.state is TrialState.RUNNING


def test_ended_candidate_cannot_be_ended_again(place: Place, tmp_path: Path) -> None:
    study = join(place, tmp_path)
    mine = claim(study)
    study.finish(mine, OUTCOME)
    with pytest.raises(LeaseLost):
        study.finish(mine, OUTCOME)
    assert study.progress().finished == 1


def test_unended_candidate_of_a_dead_worker_is_taken_over_once(place: Place, tmp_path: Path) -> None:
    claim(join(place, tmp_path)).lease.abandon()
    others = [join(place, tmp_path), join(place, tmp_path)]
    claims = [claim(study, f"w{n}") for n, study in enumerate(others)]
    assert [bool(c.candidate.resumed) for c in claims] == [True, False]
    assert claims[0].candidate.hyp == SEED


def test_lock_excludes_other_handles_and_dies_with_its_holder(place: Place, tmp_path: Path) -> None:
    storage = place.open(tmp_path)
    holder = PROCESSES.Process(target=die_with_lock, args=(place, tmp_path))
    with storage.lock():
        holder.start()
        holder.join(0.5)
        assert holder.exitcode is None
        assert not (tmp_path / "entered").exists()
    holder.join(10)
    assert holder.exitcode == -signal.SIGKILL
    with storage.lock():
        assert (tmp_path / "entered").exists()


def die_with_lock(place: Place, directory: Path) -> None:
    """Die while holding the study's lock."""
    with place.open(directory).lock():
        (directory / "entered").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def join_and_train(place: Place, directory: Path, lease_s: float = 60.0) -> None:
    """Open the study in a process of its own and finish candidates until the budget is met."""
    study = join(place, directory, budget=12, lease_s=lease_s)
    while (turn := study.ask(f"w{os.getpid()}")) is not Turn.DONE:
        if isinstance(turn, LeasedCandidate):
            study.finish(turn, OUTCOME)
        else:
            time.sleep(0.05)


def test_processes_that_open_at_once_make_one_study(place: Place, tmp_path: Path) -> None:
    workers = [PROCESSES.Process(target=join_and_train, args=(place, tmp_path)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    study = join(place, tmp_path)
    assert [c.number for c in study.finished()] == list(range(12))
    assert len({tuple(c.hyp.values()) for c in study.finished()}) == 12
    assert len(place.open(tmp_path).optuna.get_all_studies()) == 1


def test_storage_keeps_what_optuna_itself_writes(place: Place, tmp_path: Path) -> None:
    study = optuna.create_study(study_name="plain", storage=place.open(tmp_path).optuna, direction="maximize")
    study.add_trial(create_trial(value=1.5, user_attrs={"note": "é \n \u2028"}))
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    again = optuna.load_study(study_name="plain", storage=place.open(tmp_path).optuna)
    assert [t.values for t in again.trials] == [t.values for t in study.trials]
    assert again.trials[0].user_attrs == {"note": "é \n \u2028"}
    assert again.best_value == 1.5


def test_study_of_another_version_is_refused_with_both_versions(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setattr(specs, "VERSION", 1)
        join(place, tmp_path)
    with pytest.raises(UsageError, match=r"version 1, and this program works on version \d.*another --name"):
        join(place, tmp_path)


def test_what_is_told_on_the_way_is_seen_by_all_and_prunes_who_has_fallen_behind(
    place: Place, tmp_path: Path
) -> None:
    plan = StudyPlan(epochs=30, prune=True)
    first, second = (join(place, tmp_path, budget=20, plan=plan or StudyPlan()) for _ in range(2))
    for step in range(1, 10):
        mine = claim(first)
        first.report(mine, 4, step / 100)
        first.finish(mine, replace(OUTCOME, fitness=step / 50))
    behind = claim(second)
    with pytest.raises(Pruned, match=r"0\.01 after 4 of 30 epochs") as told:
        second.report(behind, 4, 0.01)
    assert second.prune(behind, told.value)
    assert not second.prune(behind, told.value)
    with pytest.raises(LeaseLost):
        second.report(behind, 12, 0.5)
    attempt = first.attempts()[-1]
    assert (attempt.state, attempt.curve, attempt.epochs) == (State.PRUNED, {4: 0.01}, 4)
    progress = first.progress()
    assert (progress.finished, progress.pruned) == (9, 1)
    assert progress.spent == pytest.approx(9 + 4 / 30)


def test_attempts_tell_how_each_training_ended(place: Place, tmp_path: Path) -> None:
    study = join(place, tmp_path, budget=4)
    claims = [claim(study, f"w{n}") for n in range(4)]
    study.finish(claims[0], OUTCOME)
    study.fail(claims[1], State.FAILED, "the loss is nan")
    study.fail(claims[2], State.STOPPED, "asked to stop")
    again = claim(study, "w9")
    told = join(place, tmp_path).attempts()
    assert [(a.number, a.root, a.state, a.worker, a.reason) for a in told] == [
        (0, 0, State.FINISHED, "w0", ""),
        (1, 1, State.FAILED, "w1", "the loss is nan"),
        (2, 2, State.STOPPED, "w2", "asked to stop"),
        (3, 3, State.RUNNING, "w3", ""),
        (4, 2, State.RUNNING, "w9", ""),
    ]
    assert (told[0].fitness, told[0].metrics) == (0.25, OUTCOME.metrics)
    assert told[4].hyp == told[2].hyp == again.candidate.hyp
    assert all((a.ended is None) == (a.state is State.RUNNING) and a.began is not None for a in told)
