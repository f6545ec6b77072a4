"""What a search needs of the place where its study lives; every storage passes the same tests.

A storage joins by its name in STORAGES and what `place` does for it; it is opened again and again, as workers do.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from app.config.hyp import Hyp
from app.search.outcome import LeaseLost, Outcome, State
from app.search.storage import StudyStorage, open_storage
from app.search.study import Claim, SearchStudy, StudyRules, Turn

STORAGES = ("journal", "postgresql")
SEED = Hyp().as_dict()
OUTCOME = Outcome(
    fitness=0.25, precision=0.5, recall=0.5, map50=0.6, map5095=0.4, box_loss=0.1, obj_loss=0.2, cls_loss=0.3
)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["app.search.study"])


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


def join(place: Place, directory: Path, budget: int = 3, lease_s: float = 60.0) -> SearchStudy:
    """Open the study as one more worker."""
    return SearchStudy.open_or_create(
        directory,
        seed_hyp=SEED,
        budget=budget,
        study_seed=0,
        signature={"data": "d1"},
        storage=place.open(directory),
        rules=StudyRules(lease_s=lease_s),
    )


def claim(study: SearchStudy, worker: str = "w") -> Claim:
    """Claim a candidate that must be there."""
    turn = study.ask(worker)
    assert isinstance(turn, Claim)
    return turn


def test_two_handles_see_one_study(place: Place, tmp_path: Path) -> None:
    first, second = join(place, tmp_path), join(place, tmp_path)
    assert first.uuid == second.uuid != ""
    mine, other = claim(first), claim(second)
    assert (mine.candidate.number, other.candidate.number) == (0, 1)
    first.finish(mine, OUTCOME)
    assert [(c.number, c.fitness, dict(c.metrics)) for c in second.finished()] == [
        (0, 0.25, OUTCOME.metrics())
    ]
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
        assert trial.user_attrs == {"worker": "w", "root": number}
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
    study = join(place, tmp_path)
    holder = PROCESSES.Process(target=die_with_lock, args=(place, tmp_path))
    with study.lock():
        holder.start()
        holder.join(0.5)
        assert holder.exitcode is None
        assert not (tmp_path / "entered").exists()
    holder.join(10)
    assert holder.exitcode == -signal.SIGKILL
    with study.lock():
        assert (tmp_path / "entered").exists()


def die_with_lock(place: Place, directory: Path) -> None:
    """Die while holding the study's lock."""
    with place.open(directory).lock():
        (directory / "entered").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def join_and_train(place: Place, directory: Path) -> None:
    """Open the study in a process of its own and finish candidates until there are none."""
    study = join(place, directory, budget=12)
    while isinstance(turn := study.ask(f"w{os.getpid()}"), Claim):
        study.finish(turn, OUTCOME)


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
    assert (told[0].fitness, told[0].metrics) == (0.25, OUTCOME.metrics())
    assert told[4].hyp == told[2].hyp == again.candidate.hyp
    assert all((a.ended is None) == (a.state is State.RUNNING) and a.began is not None for a in told)
