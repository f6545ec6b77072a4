"""A study in PostgreSQL outlasts its server, its connections and its workers; and says what is wrong with a server."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from starling.cli import search as search_command
from starling.core.errors import CheckpointError, UsageError
from starling.core.log_lines import lines_to
from starling.core.settings.study_url import parse_study_url
from starling.errors import ServerError, Stopped
from starling.search.outcome import Candidate, LeaseLost, Outcome, Report, State
from starling.search.spec import StudyRules
from starling.search.storage import database as connections
from starling.search.storage import database_storage
from starling.search.storage.database import is_transient
from starling.search.storage.database_storage import DatabaseStudyStorage
from starling.search.storage.storage import check_storage, open_storage
from starling.search.study import LeasedCandidate, SearchStudy, Turn
from starling.search.worker import WorkerSettings
from tests.conftest import REPOSITORY
from tests.contract.test_study_storage_contract import OUTCOME, PROCESSES, SEED, Clock, claim, wait_for
from tests.postgres import PostgresServer, find_programs
from tests.searches import run_search, spec

LEASES = "application_name = 'starling lease'"


def name_of(url: str) -> str:
    """Return the database's name."""
    return url.rsplit("/", 1)[1]


def open_study(url: str, directory: Path, budget: int = 3) -> SearchStudy:
    """Open the study as one more worker."""
    return SearchStudy.open_or_create(
        directory, spec(SEED, budget), storage=open_storage(url, directory), rules=StudyRules(lease_s=60)
    )


def is_cut_off(write: Callable[[], object]) -> bool:
    """Return whether a write fails for want of a connection."""
    try:
        write()
    except Exception as error:
        return is_transient(error)
    return False


def storage_of(study: SearchStudy) -> DatabaseStudyStorage:
    """Return the study's storage."""
    storage = study._storage
    assert isinstance(storage, DatabaseStudyStorage)
    return storage


@contextmanager
def own_server() -> Iterator[PostgresServer]:
    """Start a server that the test may stop."""
    programs = find_programs()
    assert programs is not None
    server = PostgresServer(programs)
    try:
        yield server
    finally:
        server.remove()


@pytest.fixture
def server(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[PostgresServer]:
    """Return a server of the test's own, its password in the environment."""
    with own_server() as server:
        monkeypatch.setenv("PGPASSWORD", server.password)
        yield server


def test_one_database_holds_many_studies_by_project_and_name(database: str, runs: Path) -> None:
    first = open_study(database, runs / "blood" / "search")
    other = open_study(database, runs / "cells" / "search")
    first.finish(claim(first), OUTCOME)
    assert (first.progress().finished, other.progress().finished) == (1, 0)
    elsewhere = open_study(database, runs.parent / "another-host" / "blood" / "search")
    assert elsewhere.uuid == first.uuid
    assert elsewhere.progress().finished == 1


def test_show_reads_a_study_of_the_database(
    database: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = open_study(database, runs / "blood" / "search")
    study.finish(claim(study), OUTCOME)
    assert search_command.main(["show", str(runs / "blood" / "search"), "--study", database]) == 0
    assert capsys.readouterr().out.startswith("1/3 finished, 0 running, 0 failed")
    assert search_command.main(["show", str(runs / "blood" / "else"), "--study", database]) == 2
    assert "study blood/else): there is no such study" in capsys.readouterr().err


def test_looking_at_a_database_without_studies_is_exit_2_and_creates_nothing(
    postgres: PostgresServer, database: str, runs: Path
) -> None:
    with pytest.raises(UsageError, match="holds no search"):
        SearchStudy.read(runs / "a" / "b", url=database)
    tables = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
    assert postgres.sql(tables, name_of(database)) == "0"


def test_lease_whose_connection_broke_is_not_taken_for_dead(
    postgres: PostgresServer, database: str, tmp_path: Path
) -> None:
    storage, clock = open_storage(database, tmp_path), Clock()
    with storage.lock():
        lease = storage.take_lease(7, "w")
    lease.keep_alive(0.05)
    watch = storage.watch(100, clock)
    with storage.lock():
        assert watch.verdict(7) is None
    assert postgres.end_sessions(name_of(database), LEASES) == 1
    until = time.monotonic() + 30
    while not postgres.sql(
        f"SELECT 1 FROM pg_stat_activity WHERE datname = '{name_of(database)}' AND {LEASES}"
    ):
        assert time.monotonic() < until, "the lease's holder does not come back"
        time.sleep(0.05)
    time.sleep(0.3)
    clock.now += 15
    with storage.lock():
        assert watch.verdict(7) is None
    lease.renew()
    lease.close()


def test_broken_connection_has_some_seconds_to_come_back_before_it_counts_as_death(
    postgres: PostgresServer, database: str, tmp_path: Path
) -> None:
    storage, clock = open_storage(database, tmp_path), Clock()
    with storage.lock():
        lease = storage.take_lease(7, "w")
    watch, verdicts = storage.watch(100, clock), list[str | None]()
    with storage.lock():
        watch.verdict(7)
    assert postgres.end_sessions(name_of(database), LEASES) == 1
    for _ in range(3):
        with storage.lock():
            verdicts.append(watch.verdict(7))
        clock.now += 9
    assert verdicts == [None, None, "its worker died"]
    lease.abandon()


def test_write_after_the_lock_was_lost_reaches_nobody(
    postgres: PostgresServer, database: str, tmp_path: Path
) -> None:
    study = open_study(database, tmp_path)
    storage = storage_of(study)
    with storage.lock():
        postgres.end_sessions(name_of(database))
        with open_storage(database, tmp_path).lock():
            pass  # free for others at once
        for again in range(2):  # a second try must not get a session of its own either
            assert is_cut_off(lambda number=again: study._study.set_user_attr("late", number))
    assert "late" not in open_study(database, tmp_path)._study.user_attrs


def test_frozen_holder_of_the_studys_lock_loses_it_and_cannot_write(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_storage, "LOCK_IDLE_S", 0.5)
    monkeypatch.setattr(database_storage, "COMPLAIN_S", 0.0)
    study = open_study(database, tmp_path)
    frozen = storage_of(study)
    until = time.monotonic() + 30

    def check_stop() -> None:
        assert time.monotonic() < until, "the frozen worker keeps the lock"

    with frozen.lock():
        with open_storage(database, tmp_path, check_stop=check_stop).lock():
            pass
        assert is_cut_off(lambda: study._study.set_user_attr("late", 1))
    assert "late" not in open_study(database, tmp_path)._study.user_attrs


def test_step_that_lost_its_connection_half_way_is_done_anew_and_once(
    postgres: PostgresServer, database: str, tmp_path: Path
) -> None:
    study = open_study(database, tmp_path)
    record, broken = study._records.end, list[int]()

    def record_and_break(*args: object) -> None:
        if not broken:
            broken.append(postgres.end_sessions(name_of(database), f"NOT ({LEASES})"))
        record(*args)  # type: ignore[arg-type]

    mine = claim(study)
    study._records.end = record_and_break  # type: ignore[method-assign]
    study.finish(mine, OUTCOME)
    assert broken
    assert [a.state for a in study.attempts()] == [State.FINISHED]


def test_result_recorded_by_a_call_that_failed_is_not_taken_for_lost(
    postgres: PostgresServer, database: str, tmp_path: Path
) -> None:
    study = open_study(database, tmp_path)
    record, calls = study._records.end, list[int]()

    def record_and_hear_nothing(*args: object) -> None:
        calls.append(1)
        record(*args)  # type: ignore[arg-type]
        raise ConnectionResetError(104, "Connection reset by peer")

    mine = claim(study)
    study._records.end = record_and_hear_nothing  # type: ignore[method-assign]
    study.finish(mine, OUTCOME)
    assert calls == [1]
    assert [a.state for a in study.attempts()] == [State.FINISHED]
    with pytest.raises(LeaseLost):
        study.finish(mine, OUTCOME)


def test_claim_recorded_by_a_call_that_failed_is_taken_up_again_at_once(
    database: str, tmp_path: Path
) -> None:
    study = open_study(database, tmp_path, budget=1)
    add, calls = study._study.add_trial, list[int]()

    def add_and_hear_nothing(trial: object) -> None:
        add(trial)  # type: ignore[arg-type]
        if not calls:
            calls.append(1)
            raise ConnectionResetError(104, "Connection reset by peer")

    study._study.add_trial = add_and_hear_nothing  # type: ignore[method-assign]
    mine = claim(study)
    assert mine.candidate.number == 1
    study.finish(mine, OUTCOME)
    assert [a.state for a in study.attempts()] == [State.LOST, State.FINISHED]
    assert study.ask("w") is Turn.DONE


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["restart", "crash"])
def test_result_waits_for_a_server_that_is_away_and_is_recorded_once(
    server: PostgresServer, tmp_path: Path, how: signal.Signals, said: list[str]
) -> None:
    url = server.create_database("studies")
    study = SearchStudy.open_or_create(tmp_path, spec(SEED, 3), storage=open_storage(url, tmp_path))
    mine = claim(study)
    server.stop(how)
    recording = threading.Thread(target=study.finish, args=(mine, OUTCOME))
    recording.start()
    recording.join(1.5)
    assert recording.is_alive()
    mine.lease._stop.set()  # type: ignore[attr-defined]  # a beat in mid-air is no part of this
    server.start()
    recording.join(60)
    assert not recording.is_alive()
    assert [a.state for a in open_study(url, tmp_path).attempts()] == [State.FINISHED]
    assert "does not answer" in said[0]
    assert said[-1].endswith("answers again")
    assert len(said) == 2


@pytest.mark.slow
def test_patience_with_a_server_that_stays_away_ends_with_exit_5_and_then_at_once(
    server: PostgresServer, tmp_path: Path
) -> None:
    url, clock, pauses = server.create_database("studies"), Clock(), list[float]()

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        clock.now += seconds

    storage = DatabaseStudyStorage(parse_study_url(url), "a/b", sleep=sleep, monotonic=clock)
    study = SearchStudy.open_or_create(tmp_path, spec(SEED, 3), storage=storage)
    mine = claim(study)
    server.stop(signal.SIGQUIT)
    with pytest.raises(ServerError, match="out of reach for 10 minutes") as caught:
        study.finish(mine, OUTCOME)
    assert caught.value.exit_code == 5
    assert 600 <= clock.now - 1000 < 610
    assert max(pauses) <= 2
    before = clock.now
    with pytest.raises(ServerError):
        study.fail(mine, State.LOST, "its worker broke")
    assert clock.now == before
    mine.lease.abandon()
    server.start()
    assert [a.state for a in study.attempts()] == [State.RUNNING]


@pytest.mark.slow
def test_asked_to_stop_while_the_server_is_away_a_worker_stops(
    server: PostgresServer, tmp_path: Path
) -> None:
    url, stop = server.create_database("studies"), list[int]()

    def check_stop() -> None:
        if stop:
            raise Stopped(signal.SIGTERM)

    study = SearchStudy.open_or_create(
        tmp_path, spec(SEED, 3), storage=open_storage(url, tmp_path, check_stop=check_stop)
    )
    mine = claim(study)
    server.stop()
    stop.append(1)
    with pytest.raises(Stopped):
        study.finish(mine, OUTCOME)
    with pytest.raises((Stopped, ServerError)):
        study.fail(mine, State.STOPPED, "stopped")
    mine.lease.abandon()


def work(url: str, directory: Path, password: str, budget: int) -> None:
    """Train candidates that take a moment, as a worker of its own."""
    os.environ["PGPASSWORD"] = password

    def objective(candidate: Candidate, report: Report) -> Outcome:
        for _ in range(10):
            time.sleep(0.03)
            report()
        return OUTCOME

    said = open(directory / f"said-{os.getpid()}", "w", buffering=1)  # noqa: SIM115 - as long as the process
    with lines_to(lambda line: print(line, file=said)):
        run_search(
            directory,
            objective,
            spec(SEED, budget),
            settings=WorkerSettings(poll_s=0.1, plot=False),
            rules=StudyRules(lease_s=60),
            storage=open_storage(url, directory),
        )


@pytest.mark.slow
def test_server_killed_in_mid_search_costs_two_workers_no_candidate(
    server: PostgresServer, tmp_path: Path
) -> None:
    url = server.create_database("studies")
    workers = [PROCESSES.Process(target=work, args=(url, tmp_path, server.password, 16)) for _ in range(2)]
    for worker in workers:
        worker.start()
    study = open_study(url, tmp_path, budget=16)
    until = time.monotonic() + 60
    for finished, how in ((3, signal.SIGQUIT), (8, signal.SIGINT)):
        while study.progress().finished < finished:
            assert time.monotonic() < until
            time.sleep(0.05)
        storage_of(study).close()
        server.stop(how)
        time.sleep(1.0)
        server.start()
    for worker in workers:
        worker.join(90)
    assert [worker.exitcode for worker in workers] == [0, 0]
    attempts = study.attempts()
    # A claim may have to be made twice where the server died between recording it and saying so.
    assert [a.state for a in attempts].count(State.FINISHED) == 16
    assert {a.state for a in attempts} <= {State.FINISHED, State.LOST}
    assert len([a for a in attempts if a.state is State.LOST]) <= 2
    assert len({tuple(a.hyp.values()) for a in attempts if a.state is State.FINISHED}) == 16
    assert len({a.worker for a in attempts}) == 2


@pytest.mark.slow
def test_workers_of_two_hosts_share_a_search_through_the_database_alone(
    database: str, tmp_path: Path, tiny_args: list[str]
) -> None:
    arguments = [*tiny_args, "--epochs", "1", "--project", "blood", "--name", "search", "--evolve", "3"]
    hosts = []
    for number in range(2):
        root = tmp_path / f"host{number}"
        root.mkdir()
        (root / "settings.json").write_text('{"mlflow": false}')
        hosts.append(
            subprocess.Popen(
                [sys.executable, "app/train.py", *arguments, "--study", database], cwd=REPOSITORY, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "STARLING_RUNS": str(root)},
            )
        )  # fmt: skip
    outputs = [host.communicate(timeout=240)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    tables = [
        (tmp_path / f"host{number}" / "blood" / "search" / "evolve.csv").read_text() for number in range(2)
    ]
    assert tables[0] == tables[1]
    assert len(tables[0].splitlines()) == 1 + 3
    assert not list(tmp_path.rglob("study.journal"))
    password = os.environ["PGPASSWORD"]
    assert not any(password in output for output in outputs)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or password.encode() not in path.read_bytes(), path


def refused(url: str, runs: Path) -> UsageError | ServerError | CheckpointError:
    """Return the error with which a study's place is refused, within seconds."""
    began = time.monotonic()
    with pytest.raises((UsageError, ServerError)) as caught:
        check_storage(url, runs / "a" / "b")
    assert time.monotonic() - began < 20  # far above the limits, far below a hang
    return caught.value


def test_wrong_or_missing_password_is_exit_2_and_never_shown(
    database: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", "hunter2-wrong")
    error = refused(database, runs)
    assert (error.exit_code, "not the one" in str(error)) == (2, True)
    assert "hunter2" not in str(error)
    monkeypatch.delenv("PGPASSWORD")
    monkeypatch.setenv("PGPASSFILE", str(runs / "none"))
    error = refused(database, runs)
    assert (error.exit_code, "asks for a password" in str(error)) == (2, True)
    assert "STARLING_STUDY_PASSWORD_FILE" in str(error)


def test_database_that_is_not_there_is_exit_2_and_says_how_to_create_it(
    postgres: PostgresServer, database: str, runs: Path
) -> None:
    error = refused(postgres.url("nothing_here"), runs)
    assert error.exit_code == 2
    assert "createdb --owner starling nothing_here" in str(error)


def test_user_who_may_not_create_tables_is_exit_2_with_the_remedy(
    postgres: PostgresServer, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", postgres.password)
    name = f"foreign_{uuid.uuid4().hex[:8]}"
    url = postgres.create_database(name, owner="postgres")
    postgres.sql("REVOKE CREATE ON SCHEMA public FROM PUBLIC", name)
    error = refused(url, runs)
    assert error.exit_code == 2
    assert f"ALTER DATABASE {name} OWNER TO starling" in str(error)


def test_server_of_read_only_transactions_is_exit_2(
    postgres: PostgresServer, database: str, runs: Path
) -> None:
    postgres.sql(f"ALTER DATABASE {name_of(database)} SET default_transaction_read_only = on")
    error = refused(database, runs)
    assert (error.exit_code, "can only be read" in str(error)) == (2, True)


def test_tables_of_another_optuna_are_exit_2(postgres: PostgresServer, database: str, runs: Path) -> None:
    check_storage(database, runs / "a" / "b")
    postgres.sql("UPDATE alembic_version SET version_num = 'v9999'", name_of(database))
    error = refused(database, runs)
    assert (error.exit_code, "another version of Optuna" in str(error)) == (2, True)


@contextmanager
def listener(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """Listen on a port; every caller gets `answer`."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)

        def serve() -> None:
            while True:
                try:
                    caller, _ = server.accept()
                except OSError:
                    return
                with caller:
                    answer(caller)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(20)


def test_server_that_is_not_there_or_silent_is_exit_5(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CONNECT_S", 0.3)
    monkeypatch.setenv("PGPASSWORD", "hunter2")
    with listener(lambda caller: None) as port:
        closing = refused(f"postgresql://u@127.0.0.1:{port}/d", runs)
    gone = refused(f"postgresql://u@127.0.0.1:{port}/d", runs)
    unknown = refused("postgresql://u@no-such-host.invalid/d", runs)
    with listener(lambda caller: time.sleep(1)) as port:
        silent = refused(f"postgresql://u@127.0.0.1:{port}/d", runs)
    for error in (closing, gone, unknown, silent):
        assert error.exit_code == 5
        assert "does not answer" in str(error)
        assert "hunter2" not in str(error)


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0" * 64, b"R\0\0\0\x08\0\0\0\x63"]
)
def test_server_that_speaks_something_else_is_exit_2_or_5(
    answer: bytes, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "CONNECT_S", 1.0)

    def say(caller: socket.socket) -> None:
        with contextlib.suppress(OSError):
            caller.recv(64)
            caller.sendall(answer)
            caller.recv(512)

    with listener(say) as port:
        encrypting = refused(f"postgresql://u@127.0.0.1:{port}/d", runs)
        plain = refused(f"postgresql://u@127.0.0.1:{port}/d?sslmode=disable", runs)
    assert (encrypting.exit_code, "the server there" in str(encrypting), "PostgreSQL" in str(encrypting)) == (
        2,
        True,
        True,
    )
    assert plain.exit_code in (2, 5)


def test_encryption_is_as_the_url_asks(server: PostgresServer, runs: Path) -> None:
    url = server.create_database("studies")
    error = refused(f"{url}?sslmode=require", runs)
    assert (error.exit_code, "does not encrypt" in str(error)) == (2, True)
    key, certificate = server.folder / "server.key", server.folder / "server.crt"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", str(key), "-out",
         str(certificate), "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    owner = server.folder.stat()
    for path in (key, certificate):
        os.chown(path, owner.st_uid, owner.st_gid)
        path.chmod(0o600)
    server.stop()
    server.start(ssl="on", ssl_cert_file=str(certificate), ssl_key_file=str(key))
    readable = runs.parent / "authority.crt"
    readable.write_bytes(certificate.read_bytes())
    check_storage(f"{url}?sslmode=require", runs / "a" / "b")
    check_storage(f"{url}?sslmode=verify-full&sslrootcert={readable}", runs / "a" / "b")
    untrusted = refused(f"{url}?sslmode=verify-full", runs)
    assert (untrusted.exit_code, "certificate is not trusted" in str(untrusted)) == (2, True)
    storage = open_storage(url, runs / "a" / "b")
    study = SearchStudy.open_or_create(runs / "a" / "b", spec(SEED, 1), storage=storage)
    assert isinstance(study.ask("w"), LeasedCandidate)
    encrypted = server.sql(
        "SELECT DISTINCT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE datname = 'studies'"
    )
    assert encrypted == "t"


def test_two_that_create_the_tables_at_once_both_can(database: str, tmp_path: Path) -> None:
    makers = [
        PROCESSES.Process(target=make, args=(database, tmp_path / str(n), os.environ["PGPASSWORD"]))
        for n in range(4)
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(60)
    assert [maker.exitcode for maker in makers] == [0] * 4
    assert all((tmp_path / f"{n}.made").exists() for n in range(4))


def make(url: str, directory: Path, password: str) -> None:
    """Open a storage in a process of its own."""
    open_storage(url, directory, environment={"PGPASSWORD": password})
    directory.with_suffix(".made").touch()
    wait_for(directory.with_suffix(".made"))
