"""Workers of one search: an exact budget, no candidate twice, none lost, whoever dies, freezes or fails."""

from __future__ import annotations

import csv
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from starling.config.hyp import Hyp
from starling.core.errors import CheckpointError, ConfigError, UsageError
from starling.errors import Stopped
from starling.search import exports
from starling.search.exports import CSV, PLOT, PLOT_LOCK, draw_plot, write_files
from starling.search.outcome import (
    Candidate,
    CandidateFailed,
    Outcome,
    Report,
    SearchFailed,
    SearchSummary,
    State,
)
from starling.search.spec import StudyRules, StudySpec
from starling.search.storage.journal import SafeJournalBackend, locked
from starling.search.study import LeasedCandidate, SearchStudy, Turn
from starling.search.worker import Worker, WorkerSettings
from tests.searches import FunctionTrainer, Train, outcome, run_search, spec

SEED = Hyp(degrees=2.0, mixup=0.1).as_dict()
# One process that has imported everything and runs no threads; workers are forked off it in milliseconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["starling.search.worker"])


def score(candidate: Candidate, report: Report) -> Outcome:
    """Train in no time: fitness is best where lr0 is 0.02."""
    report()
    return outcome(1 - abs(candidate.hyp["lr0"] - 0.02))


def settings(**changes: Any) -> WorkerSettings:
    """Return settings for a test: no plot, short waits."""
    return WorkerSettings(**{"name": "w", "poll_s": 0.02, "plot": False, **changes})


def search(directory: Path, train: Train = score, budget: int = 3, **changes: Any) -> SearchSummary:
    """Work on the search of the test."""
    about = {name: changes.pop(name) for name in ("hyp", "seed", "signature") if name in changes}
    return run_search(directory, train, search_spec(budget, **about), **changes)


def search_spec(budget: int, **changes: Any) -> StudySpec:
    """Return what the search of the test is about."""
    return spec(**{"hyp": SEED, "budget": budget, "signature": {"data": "d1"}, **changes})


def ask(directory: Path, budget: int = 3) -> LeasedCandidate:
    """Claim a candidate of the test's search, as one more worker would."""
    turn = SearchStudy.open_or_create(directory, search_spec(budget)).ask("other")
    assert isinstance(turn, LeasedCandidate)
    return turn


def study_of(directory: Path) -> SearchStudy:
    """Open the study of the test."""
    return SearchStudy.read(directory)


def rows(directory: Path) -> list[list[float]]:
    """Return evolve.csv without its header."""
    with (directory / CSV).open() as file:
        return [[float(cell) for cell in row] for row in list(csv.reader(file))[1:]]


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait until a condition holds, but not for longer."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def work_and_count(directory: Path, budget: int, name: str) -> None:
    """Work as one of several processes; leave a file that says how many were trained."""
    summary = search(directory, budget=budget, settings=settings(name=name))
    (directory / f"trained-{name}").write_text(str(summary.trained_here))


def train_for_ever(candidate: Candidate, report: Report) -> Outcome:
    """Show life until the lease is lost."""
    candidate.directory.mkdir(parents=True)
    (candidate.directory / "started").touch()
    while True:
        report()
        time.sleep(0.01)


def work_for_ever(directory: Path, budget: int, lease_s: float) -> None:
    """Work on candidates that never end."""
    search(
        directory, train_for_ever, budget, settings=settings(name="frozen"), rules=StudyRules(lease_s=lease_s)
    )
    (directory / "left alone").touch()


@pytest.mark.parametrize("budget", [21])
def test_eight_processes_make_exactly_the_budget_and_nothing_twice(tmp_path: Path, budget: int) -> None:
    workers = [PROCESSES.Process(target=work_and_count, args=(tmp_path, budget, f"w{n}")) for n in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 8
    finished = study_of(tmp_path).finished()
    assert [candidate.number for candidate in finished] == list(range(budget))
    assert len({tuple(candidate.hyp.values()) for candidate in finished}) == budget
    assert finished[0].hyp == SEED
    assert sum(int(path.read_text()) for path in tmp_path.glob("trained-*")) == budget
    assert len(rows(tmp_path)) == budget
    assert not list((tmp_path / "leases").iterdir())


def test_killed_workers_candidate_is_reclaimed_once_and_at_once(tmp_path: Path) -> None:
    victim = PROCESSES.Process(target=work_for_ever, args=(tmp_path, 2, 60.0))
    victim.start()
    wait_for((tmp_path / "candidates/0000/started").exists)
    os.kill(victim.pid or 0, signal.SIGKILL)
    victim.join()
    seen: list[Candidate] = []

    def note(candidate: Candidate, report: Report) -> Outcome:
        seen.append(candidate)
        return score(candidate, report)

    summary = search(tmp_path, note, budget=2)
    assert [(c.number, [p.name for p in c.resumes_from]) for c in seen] == [(1, ["0000"]), (2, [])]
    assert seen[0].hyp == SEED
    assert seen[0].directory.name == "0001"
    assert summary.seed_fitness == pytest.approx(0.99)
    assert (summary.progress.finished, summary.progress.failed) == (2, 0)


def test_frozen_worker_loses_its_candidate_and_abandons_it_when_thawed(tmp_path: Path) -> None:
    frozen = PROCESSES.Process(target=work_for_ever, args=(tmp_path, 1, 0.4))
    frozen.start()
    wait_for((tmp_path / "candidates/0000/started").exists)
    os.kill(frozen.pid or 0, signal.SIGSTOP)
    summary = search(tmp_path, budget=1, rules=StudyRules(lease_s=0.4))
    assert (summary.trained_here, summary.best.number) == (1, 1)
    os.kill(frozen.pid or 0, signal.SIGCONT)
    frozen.join(10)
    assert frozen.exitcode == 0
    assert (tmp_path / "left alone").exists()
    assert len(study_of(tmp_path).finished()) == 1


def test_result_of_a_lost_lease_is_not_counted(tmp_path: Path) -> None:
    def lose(candidate: Candidate, report: Report) -> Outcome:
        if candidate.number == 0:
            thief = SearchStudy.open_or_create(tmp_path, search_spec(1), rules=StudyRules(lease_s=1e-9))
            assert thief.ask("thief") is Turn.WAIT
            stolen = thief.ask("thief")
            assert isinstance(stolen, LeasedCandidate)
            thief.finish(stolen, outcome(0.25))
        return outcome(0.75)

    assert search(tmp_path, lose, budget=1).best.fitness == 0.25


def test_worker_waits_for_the_last_candidates_of_others(tmp_path: Path, said: list[str]) -> None:
    other = SearchStudy.open_or_create(tmp_path, search_spec(1))
    claim = other.ask("other")
    assert isinstance(claim, LeasedCandidate)
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            other.finish(claim, outcome(0.5))

    summary = search(tmp_path, budget=1, sleep=nap)
    assert (len(naps), summary.trained_here, summary.best.worker) == (3, 0, "other")
    assert [line for line in said if "waiting" in line] == ["waiting for 1 running of 1 candidates"]


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    "error",
    [
        CandidateFailed("loss is NaN at step 12"),
        MemoryError(),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_candidates_own_failure_is_recorded_and_the_worker_goes_on(
    tmp_path: Path, error: Exception, said: list[str]
) -> None:
    def fail_once(candidate: Candidate, report: Report) -> Outcome:
        if candidate.number == 1:
            raise error
        return score(candidate, report)

    summary = search(tmp_path, fail_once)
    assert (summary.progress.finished, summary.progress.failed) == (3, 1)
    assert [c.number for c in study_of(tmp_path).finished()] == [0, 2, 3]
    assert any(line.startswith("candidate 1: failed: ") for line in said)


@pytest.mark.parametrize("fitness", [float("nan"), float("inf")])
def test_fitness_that_cannot_be_ranked_fails_the_candidate(tmp_path: Path, fitness: float) -> None:
    def diverge_once(candidate: Candidate, report: Report) -> Outcome:
        return outcome(fitness) if candidate.number == 0 else score(candidate, report)

    summary = search(tmp_path, diverge_once)
    assert (summary.progress.failed, summary.seed_fitness) == (1, None)


def fail(candidate: Candidate, report: Report) -> Outcome:
    """Fail every time."""
    raise CandidateFailed("loss is NaN")


def test_five_failures_in_a_row_end_the_worker_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(SearchFailed, match=r"5 candidates in a row failed.*loss is NaN"):
        search(tmp_path, fail, budget=60)
    assert study_of(tmp_path).progress().failed == 5


def test_too_many_failures_over_all_workers_end_the_search(tmp_path: Path) -> None:
    with pytest.raises(SearchFailed, match="7 candidates failed, the last with: loss is NaN"):
        search(tmp_path, fail, budget=2, settings=settings(failures_in_a_row=99))


@pytest.mark.parametrize("error", [Stopped(signal.SIGTERM), KeyboardInterrupt()])
def test_stopped_candidate_is_continued_by_the_next_worker(tmp_path: Path, error: BaseException) -> None:
    def stop(candidate: Candidate, report: Report) -> Outcome:
        if candidate.number == 1 or (candidate.resumed and len(candidate.resumes_from) < 4):
            raise error
        return score(candidate, report)

    for _ in range(4):
        with pytest.raises(type(error)):
            search(tmp_path, stop)
    seen: list[Candidate] = []
    search(tmp_path, lambda c, r: (seen.append(c), score(c, r))[1])
    assert [path.name for path in seen[0].resumes_from] == ["0004", "0003", "0002", "0001"]
    assert len({tuple(c.hyp.values()) for c in study_of(tmp_path).finished()}) == 3


def test_worker_that_breaks_hands_its_candidate_on_twice_at_most(tmp_path: Path) -> None:
    def crash(candidate: Candidate, report: Report) -> Outcome:
        raise ZeroDivisionError("a bug")

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            search(tmp_path, crash)
    seen: list[Candidate] = []
    summary = search(tmp_path, lambda c, r: (seen.append(c), score(c, r))[1])
    assert not seen[0].resumed
    assert summary.progress.failed == 1


def test_candidate_that_three_workers_died_of_fails_with_the_reason_and_makes_way_for_another(
    tmp_path: Path,
) -> None:
    for _ in range(3):
        ask(tmp_path).lease.abandon()
    new = ask(tmp_path).candidate
    assert (new.number, new.resumed) == (3, False)
    attempts = study_of(tmp_path).attempts()
    assert [(a.root, a.reason) for a in attempts] == [(0, "its worker died")] * 3 + [(3, "")]
    assert study_of(tmp_path).progress().failed == 1


def test_full_disk_at_the_result_leaves_the_candidate_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_disk(candidate: Candidate, report: Report) -> Outcome:
        def refuse(backend: object, logs: object) -> None:
            raise CheckpointError("disk full")

        monkeypatch.setattr(SafeJournalBackend, "append_logs", refuse)
        return outcome(0.5)

    with pytest.raises(CheckpointError, match="disk full"):
        search(tmp_path, fill_disk)
    monkeypatch.undo()
    summary = search(tmp_path)
    assert (summary.progress.finished, summary.seed_fitness) == (3, pytest.approx(0.99))


def test_full_disk_at_a_takeover_leaves_the_candidate_to_be_taken_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(tmp_path).lease.abandon()

    def refuse(backend: object, logs: object) -> None:
        raise CheckpointError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(SafeJournalBackend, "append_logs", refuse)
        with pytest.raises(CheckpointError, match="disk full"):
            ask(tmp_path)
    assert ask(tmp_path).candidate.resumed
    assert [attempt.reason for attempt in study_of(tmp_path).attempts()] == ["its worker died", ""]


def test_folder_that_cannot_be_written_is_exit_4_and_claims_nothing(tmp_path: Path) -> None:
    (tmp_path / "leases").touch()  # a file where a folder has to be
    with pytest.raises(CheckpointError, match="leases/0000: cannot be written") as caught:
        search(tmp_path)
    assert caught.value.exit_code == 4
    assert study_of(tmp_path).progress().running == 0
    with pytest.raises(CheckpointError, match="cannot be written"):
        search(tmp_path / "leases" / "below")


def test_result_counts_if_the_lease_is_gone_but_nobody_took_over(tmp_path: Path) -> None:
    def lose_file(candidate: Candidate, report: Report) -> Outcome:
        (tmp_path / "leases" / f"{candidate.number:04d}").unlink()
        return outcome(0.5)

    assert search(tmp_path, lose_file).progress.finished == 3


def test_views_that_cannot_be_written_do_not_stop_the_search(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / CSV).mkdir(parents=True)
    assert search(tmp_path).progress.finished == 3
    assert any("behind the study" in line for line in said)


def test_stop_while_waiting_is_heard(tmp_path: Path) -> None:
    other = SearchStudy.open_or_create(tmp_path, search_spec(1))
    claim = other.ask("other")
    calls = iter(range(3))

    def check_stop() -> None:
        if next(calls) == 2:
            raise Stopped(signal.SIGTERM)

    with pytest.raises(Stopped):
        search(tmp_path, budget=1, check_stop=check_stop)
    assert isinstance(claim, LeasedCandidate)
    claim.lease.close()


def test_larger_budget_of_a_joiner_counts_and_a_smaller_does_not(tmp_path: Path) -> None:
    assert search(tmp_path, budget=2).progress.budget == 2
    assert search(tmp_path, budget=4).trained_here == 2
    again = search(tmp_path, budget=1)
    assert (again.progress.budget, again.trained_here) == (4, 0)


def test_waiting_worker_goes_on_when_a_joiner_raises_the_budget(tmp_path: Path) -> None:
    claim = ask(tmp_path, budget=1)

    def nap(seconds: float) -> None:
        SearchStudy.open_or_create(tmp_path, search_spec(3)).finish(claim, outcome(0.5))

    summary = search(tmp_path, budget=1, sleep=nap)
    assert (summary.progress.budget, summary.progress.finished, summary.trained_here) == (3, 3, 2)


def work_by_another_clock(directory: Path, name: str, ahead_s: float) -> None:
    """Work on a host whose clock is so many seconds ahead, and with it what it writes into files and their times."""
    import datetime
    from types import SimpleNamespace

    from optuna.storages.journal import _storage
    from optuna.trial import _frozen

    real = datetime.datetime

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
            return real.now(tz) + datetime.timedelta(seconds=ahead_s)

    utime, now = os.utime, time.time
    _storage.datetime = Clock
    _frozen.datetime = SimpleNamespace(datetime=Clock)
    time.time = lambda: now() + ahead_s
    os.utime = lambda path, times=None: utime(path, times or (time.time(), time.time()))

    def train(candidate: Candidate, report: Report) -> Outcome:
        report()
        if candidate.number < 2:  # until the other has looked at this one's lease, and begun
            wait_for(lambda: len({a.worker for a in study_of(directory).attempts()}) == 2, seconds=60)
        report()
        return score(candidate, report)

    search(directory, train, budget=8, settings=settings(name=name), rules=StudyRules(lease_s=60))


def test_two_workers_whose_clocks_are_two_days_apart_share_a_search(tmp_path: Path) -> None:
    workers = [
        PROCESSES.Process(target=work_by_another_clock, args=(tmp_path, f"w{ahead}", ahead * 86_400.0))
        for ahead in (-1, 1)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    attempts = study_of(tmp_path).attempts()
    assert [(a.number, a.state) for a in attempts] == [(n, State.FINISHED) for n in range(8)]
    began = {attempt.worker: attempt.began.timestamp() for attempt in attempts if attempt.began}
    assert began["w1"] - began["w-1"] > 1.9 * 86_400
    assert len(rows(tmp_path)) == 8


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"signature": {"data": "d2"}}, "signature.data: 'd1' in the study, 'd2' here"),
        ({"signature": {"data": "d1", "epochs": 3}}, "signature.epochs: None in the study, 3 here"),
        ({"hyp": {**SEED, "lr0": 0.02}}, "hyp.lr0: 0.01 in the study, 0.02 here"),
        ({"seed": 1}, "seed: 0 in the study, 1 here"),
    ],
)
def test_search_for_something_else_is_refused_with_the_difference(
    tmp_path: Path, change: dict[str, Any], shown: str
) -> None:
    search(tmp_path, budget=1)
    with pytest.raises(UsageError) as caught:
        search(tmp_path, budget=1, **change)
    assert shown in str(caught.value)
    assert caught.value.exit_code == 2


def test_budget_and_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        search(tmp_path, budget=0)
    for bad in ({"lease_s": 0}, {"max_retries": -1}, {"spare_failures": -1}):
        with pytest.raises(ConfigError):
            StudyRules(**bad)
    for wrong in ({"poll_s": 0}, {"failures_in_a_row": 0}):
        with pytest.raises(ConfigError):
            settings(**wrong)


def test_progress_is_shown_to_the_trainer_and_the_study_has_one_id(tmp_path: Path) -> None:
    shown: list[tuple[int, int | None]] = []
    trainer = FunctionTrainer(
        score, lambda progress, c: shown.append((progress.finished, None if c is None else c.number))
    )
    study = SearchStudy.open_or_create(tmp_path, search_spec(3))
    Worker(study, trainer, settings=settings()).run()
    assert len(study.uuid) == 32
    assert study_of(tmp_path).uuid == study.uuid
    assert shown == [(0, 0), (1, 1), (2, 2), (3, None)]


@pytest.fixture
def views(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the writing of views by notes of it, each of which takes a while."""
    written: list[str] = []

    def write_files(study: SearchStudy) -> None:
        written.append(f"files of {study.progress().finished}")
        time.sleep(0.01)

    def draw_plot(study: SearchStudy, *, wait: bool) -> None:
        written.append(f"plot of {study.progress().finished}")

    monkeypatch.setattr(exports, "write_files", write_files)
    monkeypatch.setattr(exports, "draw_plot", draw_plot)
    return written


def test_views_are_written_at_last_and_not_between_trainings_that_take_no_time(
    tmp_path: Path, views: list[str]
) -> None:
    search(tmp_path, budget=5, settings=settings(plot=True))
    assert views == ["files of 1", "files of 5", "plot of 5"]


def test_a_worker_that_leaves_early_leaves_no_file_behind_the_study(tmp_path: Path, views: list[str]) -> None:
    def stop(candidate: Candidate, report: Report) -> Outcome:
        if candidate.number == 3:
            raise Stopped(signal.SIGTERM)
        return score(candidate, report)

    with pytest.raises(Stopped):
        search(tmp_path, stop, budget=5)
    assert views == ["files of 1", "files of 3"]


def test_a_worker_that_waits_for_others_leaves_no_file_behind_the_study(
    tmp_path: Path, views: list[str]
) -> None:
    others: list[LeasedCandidate] = []

    def train(candidate: Candidate, report: Report) -> Outcome:
        if candidate.number == 1:
            others.append(ask(tmp_path))
        return score(candidate, report)

    def nap(seconds: float) -> None:
        assert views == ["files of 1", "files of 2"]
        study_of(tmp_path).finish(others[0], outcome(0.5))

    search(tmp_path, train, budget=3, sleep=nap)
    assert views == ["files of 1", "files of 2", "files of 3"]


def test_views_are_written_after_each_long_training_but_for_a_plot_that_another_worker_has_just_drawn(
    tmp_path: Path, views: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(exports.time, "monotonic", lambda: now[0])

    def train(candidate: Candidate, report: Report) -> Outcome:
        now[0] += 80
        if candidate.number == 1:
            (tmp_path / PLOT).touch()
        return score(candidate, report)

    search(tmp_path, train, budget=4, settings=settings(plot=True))
    assert views == ["files of 1", "plot of 1", "files of 2", "files of 3", "plot of 3", "files of 4",
                     "plot of 4", "files of 4", "plot of 4"]  # fmt: skip


def test_nobody_waits_for_the_worker_that_draws_unless_it_is_the_last_plot(tmp_path: Path) -> None:
    search(tmp_path, budget=1)
    study = study_of(tmp_path)
    with locked(tmp_path / PLOT_LOCK):
        draw_plot(study, wait=False)
        assert not (tmp_path / PLOT).exists()
        write_files(study)  # nor do the files
    draw_plot(study, wait=False)
    assert (tmp_path / PLOT).exists()
