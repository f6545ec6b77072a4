"""`kill` and `clean` on the local engine: what ends, what is removed, and what nothing may touch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.devices.devices import Device
from launcher.engines.base import ReplicaSpec
from launcher.engines.local.local import LocalEngine
from launcher.errors import EngineError
from launcher.status.progress import read_progress
from launcher.status.run_folders import RunFolder, delete, forget_workers, run_folders, unused
from starling.core.errors import UsageError
from tests.conftest import PYTHON_PATH
from tests.waiting import wait_until

SLEEP = "import time; time.sleep(60)"
FLEET = "blood/search"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LocalEngine]:
    runs = tmp_path / "runs"
    runs.mkdir()
    engine = LocalEngine(runs, os.getuid())
    yield engine
    for state in engine.list():
        engine.remove(state.id)


@pytest.fixture
def replica(engine: LocalEngine, tmp_path: Path) -> Callable[..., str]:
    def start(name: str, code: str = SLEEP, fleet: str = FLEET) -> str:
        command = (sys.executable, "-c", code)
        replica_id = engine.create(
            ReplicaSpec(name=name, fleet=fleet, device=Device("cpu", "0"), image="", image_id="", command=command,
                        environment={}, runs=tmp_path / "runs")
        )  # fmt: skip
        engine.start(replica_id)
        if code != SLEEP:
            wait_until(lambda: (state := engine.state(replica_id)) is not None and not state.live)
        return replica_id

    return start


@pytest.fixture
def launcher(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*words: str, answer: str | None = None) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("STARLING_")}
        return subprocess.run(
            [sys.executable, "-m", "launcher", *words],
            cwd=tmp_path,
            env={**clean, "PYTHONPATH": PYTHON_PATH, "STARLING_ENGINE": "local"},
            input=answer or "",
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def make_run(runs: Path, folder: str = FLEET) -> Path:
    path = runs / folder
    (path / "weights").mkdir(parents=True)
    (path / ".lock").touch()
    (path / "weights/last.pt").write_bytes(b"x" * 5000)
    return path


def test_kill_ends_those_named_leaves_them_listed_and_spares_the_rest(
    engine: LocalEngine,
    replica: Callable[..., str],
    launcher: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    replica("a"), replica("b"), replica("ended", "raise SystemExit(3)")
    done = launcher("kill", "--json", "a", "ended")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["replicas"] == [
        {"replica": "a", "killed": True, "state": "killed (137)"},
        {"replica": "ended", "killed": False, "state": "exited 3: data error"},
    ]
    assert {state.name: state.phase for state in engine.list()} == {
        "a": "exited",
        "b": "running",
        "ended": "exited",
    }
    assert launcher("kill", FLEET).stdout.splitlines()[0] == "a: killed (137), as before"
    assert launcher("kill", "nobody").returncode == 2
    assert launcher("kill").returncode == 2


def test_clean_removes_what_has_ended_and_neither_the_living_nor_any_result(
    engine: LocalEngine,
    replica: Callable[..., str],
    launcher: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    replica("alive"), replica("dead", "raise SystemExit(3)")
    run = make_run(tmp_path / "runs")
    assert launcher("clean").returncode == 2, "nobody answers"
    asked = launcher("clean", answer="n\n")
    assert asked.returncode == 1
    assert "dead  exited 3: data error" in asked.stdout
    assert "alive  running: stays" in asked.stdout
    listed = launcher("clean", "--dry-run", "--json")
    assert json.loads(listed.stdout)["replicas"] == ["dead"]
    assert sorted(state.name for state in engine.list()) == ["alive", "dead"]
    assert launcher("clean", answer="y\n").returncode == 0
    assert [state.name for state in engine.list()] == ["alive"]
    assert (run / "weights/last.pt").exists()
    assert launcher("clean", "--json").returncode == 2


def test_clean_removes_results_only_when_asked_and_only_those_of_the_fleet(
    replica: Callable[..., str], launcher: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    replica("dead", "raise SystemExit(3)")
    mine, second, other = make_run(runs), make_run(runs, "blood/search2"), make_run(runs, "blood/other")
    third = make_run(runs, "blood/search3")
    (runs / ".workers").mkdir()
    # A replica may write anything here: a folder of its own fleet's kind counts, any other does not.
    (runs / ".workers/dead.restarts.json").write_text("{}")
    (runs / ".workers/dead.json").write_text(
        json.dumps({"run_dir": f"/usr/src/app/runs/{second.relative_to(runs)}"})
    )
    done = launcher("clean", "--runs-too", "--yes")
    assert done.returncode == 0, done.stderr
    assert f"{mine}  2 files" in done.stdout
    assert not mine.exists()
    assert not second.exists()
    assert (other.exists(), third.exists()) == (True, True)
    assert sorted(path.name for path in runs.iterdir()) == [".workers", "blood"]
    assert list((runs / ".workers").iterdir()) == []
    again = launcher("clean", "--runs-too", "--yes", "blood/other", "blood/search3")
    assert again.returncode == 0, again.stderr
    assert not (runs / "blood").exists()
    assert launcher("clean", "--runs-too", "--yes", "blood/other").returncode == 2


def test_results_of_a_fleet_that_runs_stay(
    replica: Callable[..., str], launcher: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    replica("alive"), replica("dead", "raise SystemExit(3)")
    run = make_run(tmp_path / "runs")
    for names in ((), ("dead",), (FLEET,)):
        done = launcher("clean", "--runs-too", "--yes", *names)
        assert done.returncode == 2
        assert "alive still runs" in done.stderr
    assert (run / "weights/last.pt").exists()


def test_results_whose_lock_file_somebody_removed_stay_while_the_trainer_holds_the_folder(
    tmp_path: Path,
) -> None:
    from starling.outputs.run_dir import run_lock

    run = tmp_path / "runs/blood/x"
    (run / "weights").mkdir(parents=True)
    [found] = run_folders(tmp_path / "runs", "blood/x", [])
    with run_lock(run):
        (run / ".lock").unlink()
        with pytest.raises(UsageError, match="is in use"), unused(tmp_path / "runs", found):
            pass
    with unused(tmp_path / "runs", found) as folder:
        delete(tmp_path / "runs", found, folder)
    assert not run.exists()


@pytest.mark.parametrize("lock", [".lock", "candidates/7/.lock", "leases/0007", "study.lock"])
def test_results_whose_lock_is_held_stay_and_the_holder_is_named(lock: str, tmp_path: Path) -> None:
    path = make_run(tmp_path)
    (path / lock).parent.mkdir(parents=True, exist_ok=True)
    [run] = run_folders(tmp_path, FLEET, [])
    with open(path / lock, "w") as file:
        file.write("process 77 on box\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="process 77 on box holds"), unused(tmp_path, run):
            raise AssertionError("not reached")
    remove(tmp_path, run)
    assert not path.exists()


@pytest.mark.parametrize("fleet", ["../x", "/etc/x", "a/../../x", "x", "a/.."])
def test_a_fleets_name_never_leads_out_of_the_runs_folder(fleet: str, tmp_path: Path) -> None:
    make_run(tmp_path, "x")
    with pytest.raises(UsageError, match="is no fleet"):
        run_folders(tmp_path / "runs", fleet, [])


def test_links_are_never_followed(tmp_path: Path) -> None:
    runs, outside = tmp_path / "runs", make_run(tmp_path, "outside/run")
    (runs / "blood").mkdir(parents=True)
    (runs / FLEET).symlink_to(outside)
    (runs / "project").symlink_to(outside.parent)
    for fleet in (FLEET, "project/run"):
        with pytest.raises(UsageError, match="is a link"):
            run_folders(runs, fleet, [])
    inside = make_run(runs, "blood/real")
    (inside / "out").symlink_to(outside)
    (inside / "linked.lock").symlink_to(outside / ".lock")
    [run] = run_folders(runs, "blood/real", [])
    remove(runs, run)
    assert (outside / "weights/last.pt").exists()
    assert not inside.exists()


def test_a_folder_that_holds_no_run_stays(tmp_path: Path) -> None:
    (tmp_path / FLEET).mkdir(parents=True)
    (tmp_path / FLEET / "thesis.tex").touch()
    with pytest.raises(UsageError, match="holds no run"):
        run_folders(tmp_path, FLEET, [])


def test_what_the_disk_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path)
    [run] = run_folders(tmp_path, FLEET, [])

    def refuse(name: str, **_: object) -> None:
        raise PermissionError(1, "Operation not permitted", name)

    monkeypatch.setattr("os.unlink", refuse)
    with pytest.raises(EngineError, match=r"last\.pt: could not be removed|\.lock: could not be removed"):
        remove(tmp_path, run)


def remove(runs: Path, run: RunFolder) -> None:
    """Remove a run as `clean` does once the user has said yes."""
    with unused(runs, run) as folder:
        delete(runs, run, folder)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder outside the runs folder that looks like a run, and must stay whatever somebody does."""
    return make_run(tmp_path / "elsewhere")


def swap_project(runs: Path, elsewhere: Path) -> None:
    (runs / "blood").rename(runs / "aside")
    (runs / "blood").symlink_to(elsewhere.parent)


def swap_run(runs: Path, elsewhere: Path) -> None:
    (runs / FLEET).rename(runs / "aside")
    (runs / FLEET).symlink_to(elsewhere)


def move_another_in(runs: Path, elsewhere: Path) -> None:
    (runs / FLEET).rename(runs / "aside")
    elsewhere.rename(runs / FLEET)


Swap = Callable[[Path, Path], None]


@pytest.mark.parametrize("swap", [swap_project, swap_run, move_another_in])
@pytest.mark.parametrize(
    "moment", ["while the user is asked", "while the locks are held", "before the rename"]
)
def test_another_folder_put_in_a_runs_place_after_the_look_is_never_removed(
    swap: Swap, moment: str, tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    make_run(runs)
    [run] = run_folders(runs, FLEET, [])
    real = os.rename

    def rename(*words: str, **folders: int) -> None:
        monkeypatch.setattr("os.rename", real)
        swap(runs, elsewhere)
        real(*words, **folders)

    def clean() -> None:
        if moment == "while the user is asked":
            swap(runs, elsewhere)
        with unused(runs, run) as folder:
            if moment == "while the locks are held":
                swap(runs, elsewhere)
            if moment == "before the rename":
                monkeypatch.setattr("os.rename", rename)
            delete(runs, run, folder)

    with contextlib.suppress(UsageError):  # what was looked at may be removed where it is now
        clean()
    stays = runs / FLEET if swap is move_another_in else elsewhere
    assert (stays / "weights/last.pt").exists()


RACE_S = 1.5


def test_a_replica_that_swaps_its_project_as_fast_as_it_can_has_nothing_removed_elsewhere(
    tmp_path: Path, elsewhere: Path
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    attacker = os.fork()
    if attacker == 0:
        while True:
            with contextlib.suppress(OSError):
                os.rename(runs / "blood", runs / "aside")
                os.symlink(elsewhere.parent, runs / "blood")
                os.unlink(runs / "blood")
                os.rename(runs / "aside", runs / "blood")
    removed, until = 0, time.monotonic() + RACE_S
    try:
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                make_run(runs, "aside/search")
                os.rename(runs / "aside", runs / "blood")
            with contextlib.suppress(UsageError, EngineError):
                for run in run_folders(runs, FLEET, []):
                    remove(runs, run)
                    removed += 1
            assert sorted(path.name for path in elsewhere.iterdir()) == [".lock", "weights"]
        assert os.waitpid(attacker, os.WNOHANG) == (0, 0), "the attacker has died"
    finally:
        os.kill(attacker, signal.SIGKILL)
        os.waitpid(attacker, 0)


def test_a_run_with_more_locks_than_a_process_has_descriptors_is_removed_and_a_held_one_still_counts(
    tmp_path: Path,
) -> None:
    path = make_run(tmp_path)
    (path / "leases").mkdir()
    for number in range(600):
        (path / f"leases/{number}").touch()
    [run] = run_folders(tmp_path, FLEET, [])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, limits[1]))
    try:
        for held in ("0", "300", "599"):
            with open(path / "leases" / held) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                with pytest.raises(UsageError, match=f"holds leases/{held}"), unused(tmp_path, run):
                    raise AssertionError("not reached")
        remove(tmp_path, run)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not path.exists()


def test_links_in_place_of_the_status_folder_are_not_followed(tmp_path: Path) -> None:
    runs, outside = tmp_path / "runs", tmp_path / "outside"
    make_run(runs, "blood/search2")
    outside.mkdir()
    (outside / "r.json").write_text(json.dumps({"run_dir": "/runs/blood/search2", "phase": "training"}))
    (runs / ".workers").symlink_to(outside)
    assert run_folders(runs, FLEET, ["r"]) == []
    assert read_progress(runs, "r").phase is None
    forget_workers(runs, ["r"])
    assert (outside / "r.json").exists()


@pytest.mark.parametrize("said", ["blood/other", "/etc", "search", "search2/..", "..", 7, None, "a\0b"])
def test_what_a_replica_says_of_its_folder_is_not_trusted(said: object, tmp_path: Path) -> None:
    make_run(tmp_path, "blood/other")
    (tmp_path / ".workers").mkdir()
    (tmp_path / ".workers/r.json").write_text(json.dumps({"run_dir": said}))
    assert run_folders(tmp_path, FLEET, ["r", "../r"]) == []
