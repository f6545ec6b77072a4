"""The main process of a replica: what is started again, what is not, and who is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from starling.core.cgroups import own_oom_kills
from starling.core.worker_status import RestartRecord, unfinished_run
from starling.supervise import KILLS_FILE, End, RestartPolicy, oom_kills
from tests.conftest import REPOSITORY
from tests.waiting import wait_until

REPLICA = "a-b-cpu0"


def begin(folder: Path, script: str, *options: str) -> subprocess.Popen[str]:
    """Supervise a shell script that appends a line to `attempts` each time it is started."""
    return subprocess.Popen(
        [sys.executable, "-S", str(REPOSITORY / "app/supervise.py"), "--early", "0", "--delay", "0.05", *options,
         "--", "sh", "-c", f"echo at >> attempts; {script}"],
        cwd=folder,
        env={**os.environ, "STARLING_REPLICA": REPLICA, "STARLING_RUNS": str(folder)},
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def supervise(folder: Path, script: str, *options: str) -> tuple[int, int, str]:
    """Return the exit code, the number of attempts, and what the supervisor said."""
    process = begin(folder, script, *options)
    _, said = process.communicate(timeout=20)
    return process.returncode, attempts(folder), said


def attempts(folder: Path) -> int:
    path = folder / "attempts"
    return len(path.read_text().splitlines()) if path.exists() else 0


def record(folder: Path) -> dict[str, object]:
    values: dict[str, object] = json.loads((folder / f".workers/{REPLICA}.restarts.json").read_text())
    return values


def test_a_crash_is_started_again_until_it_ends_well(tmp_path: Path) -> None:
    code, tries, said = supervise(tmp_path, "[ $(wc -l < attempts) = 3 ] || kill -SEGV $$")
    assert (code, tries) == (0, 3)
    assert "killed by SIGSEGV; starting it again in 0.05 s (1 of 3)" in said
    assert record(tmp_path)["restarts"] == 2


def test_crashes_without_end_are_given_up_with_the_trainers_own_code(tmp_path: Path) -> None:
    code, tries, said = supervise(tmp_path, "exit 7", "--max-restarts", "2")
    assert (code, tries) == (7, 3)
    assert "given up after 2 restarts" in said
    assert record(tmp_path) | {"updated": 0} == {
        "restarts": 2, "max_restarts": 2, "exit_code": 7, "oom_killed": False, "delay_s": None, "restart_at": None,
        "updated": 0,
    }  # fmt: skip


@pytest.mark.parametrize("code", [0, 2, 3, 4, 6, 127, 130, 143])
def test_an_end_that_another_try_would_not_change_is_the_end(code: int, tmp_path: Path) -> None:
    assert supervise(tmp_path, f"exit {code}")[:2] == (code, 1)


def test_nothing_is_started_again_with_0_restarts(tmp_path: Path) -> None:
    code, tries, said = supervise(tmp_path, "exit 1", "--max-restarts", "0")
    assert (code, tries) == (1, 1)
    assert "--max-restarts 0" in said


def test_a_failure_in_the_first_seconds_is_ups_to_tell_and_not_started_again(tmp_path: Path) -> None:
    assert supervise(tmp_path, "exit 1", "--early", "5")[:2] == (1, 1)


def test_waits_double_up_to_a_bound() -> None:
    policy = RestartPolicy()
    assert [policy.delay(restart) for restart in (1, 2, 3, 9)] == [4, 8, 16, 300]


@pytest.mark.parametrize("code", [137, 1])
def test_out_of_memory_is_never_tried_again(code: int) -> None:
    refusal = RestartPolicy().refusal(End(code=code, lasted_s=100, oom_killed=True), 0)
    assert refusal is not None
    assert "--memory" in refusal
    assert RestartPolicy().refusal(End(code=137, lasted_s=100), 0) is None, "137 alone says nothing of memory"


@pytest.mark.parametrize(("told", "tries"), [('"lasting": true', 1), ('"lasting": null', 2)])
def test_a_failure_that_lasts_by_the_trainers_own_account_is_not_tried_again(
    told: str, tries: int, tmp_path: Path
) -> None:
    status = f'{{"phase": "failed", {told}}}'
    script = f"echo '{status}' > .workers/{REPLICA}.json; exit 1"
    assert supervise(tmp_path, script, "--max-restarts", "1")[:2] == (1, tries)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_the_trainer_and_is_no_crash(number: signal.Signals, tmp_path: Path) -> None:
    process = begin(tmp_path, f"trap 'echo saved > saved; exit {128 + number}' {int(number)}; "
                    "touch ready; while :; do sleep 0.02; done")  # fmt: skip
    wait_until((tmp_path / "ready").exists)
    process.send_signal(number)
    assert process.wait(10) == 128 + number
    assert (tmp_path / "saved").exists()
    assert attempts(tmp_path) == 1


def test_a_trainer_that_fails_while_it_stops_is_not_started_again(tmp_path: Path) -> None:
    process = begin(tmp_path, "trap 'exit 1' TERM; touch ready; while :; do sleep 0.02; done")
    wait_until((tmp_path / "ready").exists)
    process.terminate()
    assert process.wait(10) == 1
    assert attempts(tmp_path) == 1


def test_a_stop_while_waiting_for_the_next_try_ends_at_once(tmp_path: Path) -> None:
    process = begin(tmp_path, "exit 1", "--delay", "60")
    wait_until(
        lambda: (tmp_path / f".workers/{REPLICA}.restarts.json").exists() and record(tmp_path)["delay_s"]
    )
    told = record(tmp_path)
    assert told["delay_s"] == 60
    assert isinstance(told["restart_at"], float)
    process.terminate()
    assert process.wait(10) == 143
    assert attempts(tmp_path) == 1


@pytest.mark.parametrize("end", ["exit 0", "exit 3", "kill -TERM $$"])
def test_set_id_bits_that_a_trainer_leaves_in_the_runs_folder_are_gone_with_it(
    end: str, tmp_path: Path
) -> None:
    make = "mkdir -p a/b; cp /bin/true a/b/shell; chmod 4755 a/b/shell; cp /bin/true group; chmod 2755 group"
    _, _, said = supervise(tmp_path, f"{make}; {end}", "--max-restarts", "0")
    assert (tmp_path / "a/b/shell").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "group").stat().st_mode & 0o7777 == 0o755
    assert "2 files lost their set-user-id or set-group-id bit" in said


def test_the_trainer_dies_with_its_supervisor(tmp_path: Path) -> None:
    process = begin(tmp_path, "echo $$ > pid; exec sleep 60")
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
    trainer = int((tmp_path / "pid").read_text())
    process.kill()
    wait_until(lambda: not Path(f"/proc/{trainer}").exists())


def test_a_new_replica_forgets_what_the_last_one_told_but_not_its_run(tmp_path: Path) -> None:
    status = tmp_path / f".workers/{REPLICA}.json"
    status.parent.mkdir()
    status.write_text(json.dumps({"phase": "failed", "epoch": 3, "message": "old", "run_dir": "/r/b/s"}))
    assert supervise(tmp_path, "exit 0")[0] == 0
    assert json.loads(status.read_text()) | {"updated": 0} == {"run_dir": "/r/b/s", "updated": 0}


@pytest.mark.parametrize(
    "content", ["", "[]", '{"run_dir": 3}', "[" * 50_000, "{}", '{"run_dir": "/r", "phase": "done"}']
)
def test_a_status_that_is_garbled_or_of_a_finished_run_names_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "s").write_text(content)
    assert unfinished_run(tmp_path / "s") is None


def test_a_runs_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / ".workers").write_text("a file in the way")
    RestartRecord(tmp_path, REPLICA, 3).begin()
    assert supervise(tmp_path, "exit 0")[:2] == (0, 1)


@pytest.mark.parametrize(
    ("membership", "file"),
    [
        ("7:memory:/docker/abc", "memory/docker/abc/memory.oom_control"),
        ("7:memory:/docker/abc", "memory/memory.oom_control"),  # inside a container
        ("0::/user.slice/a.scope", "user.slice/a.scope/memory.events"),
        ("0::/", "memory.events"),
    ],
)
def test_kills_for_memory_are_counted_by_either_version_of_cgroups(
    membership: str, file: str, tmp_path: Path
) -> None:
    (tmp_path / "cgroup").write_text(f"1:cpu,cpuacct:/elsewhere\n{membership}\n")
    counts = tmp_path / "fs" / file
    counts.parent.mkdir(parents=True)
    counts.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert own_oom_kills(tmp_path / "cgroup", tmp_path / "fs") == 2
    counts.unlink()
    assert own_oom_kills(tmp_path / "cgroup", tmp_path / "fs") == 0


def test_an_engine_that_kills_for_memory_itself_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = tmp_path / "kills"
    before = oom_kills({KILLS_FILE: str(kills)})
    kills.write_text("2")
    assert oom_kills({KILLS_FILE: str(kills)}) == before + 2
    monkeypatch.setenv(KILLS_FILE, str(kills))
    code, tries, said = supervise(tmp_path, "echo 3 > kills; kill -9 $$")
    assert (code, tries) == (137, 1)
    assert "out of memory" in said
