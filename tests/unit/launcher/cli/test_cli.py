"""The command line on the local engine and without any: whole stories, from words typed to exit codes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.engines.local import supervisor
from launcher.engines.local.local import LocalEngine
from starling.core.process import stat_of
from tests.conftest import PYTHON_PATH
from tests.waiting import wait_until


def launcher(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("STARLING_")}
    return subprocess.run(
        [sys.executable, "-m", "launcher", *words],
        cwd=cwd,
        env={**clean, "PYTHONPATH": PYTHON_PATH, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_no_replicas_says_none_and_is_no_success(tmp_path: Path) -> None:
    done = launcher("status", "--engine", "local", cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("none\n", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--gpus", "5-1"], 2),
        (["--gpus", "0", "--cpu", "1"], 2),
        (["--cpu", "1", "--memory", "lots"], 2),
        (["--cpu", "1", "--memory", "900t"], 2),
        (["--cpu", "1", "--env", "NOT_SET_ANYWHERE"], 2),
        (["--cpu", "1", "--json"], 2),
        (["--cpu", "1", "--engine", "ray"], 2),
        (["--cpu", "1", "--network", "mlflow"], 2),
        (["--cpu", "1", "--", "--data", "gone.yaml"], 3),
        (["--cpu", "1", "--", "--weights", "gone.pt"], 4),
    ],
)
def test_bad_input_is_one_message_and_touches_nothing(words: list[str], code: int, tmp_path: Path) -> None:
    training = (
        () if "--" in words else ("--", "--data", "bccd.yaml", "--weights", "", "--cfg", "yolov5n.yaml")
    )
    engine = () if "--engine" in words else ("--engine", "local")
    done = launcher("up", *engine, *words, *training, cwd=tmp_path)
    assert done.returncode == code
    assert "no training arguments" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.lower().count("error:") == 1
    assert list(tmp_path.iterdir()) == []


def test_up_without_training_arguments_says_where_they_go(tmp_path: Path) -> None:
    done = launcher("up", "--engine", "local", "--cpu", "1", cwd=tmp_path)
    assert done.returncode == 2
    assert "after `--`" in done.stderr


def test_a_dry_run_starts_nothing_and_hides_values(tmp_path: Path) -> None:
    words = ["up", "--engine", "local", "--cpu", "1", "--env", "TOKEN", "--dry-run"]
    training = ["--", "--data", "bccd.yaml", "--evolve", "2"]
    text = launcher(*words, *training, cwd=tmp_path, TOKEN="s3cret").stdout
    plan = launcher(*words, "--json", *training, cwd=tmp_path, TOKEN="s3cret").stdout
    assert "s3cret" not in text + plan
    assert "TOKEN" in json.loads(plan)["replicas"][0]["passed_environment"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", [["--dry-run"], ["--gpus", "1"], ["--gpus=1"], ["--memory", "1g"], ["--runs", "x"], ["-f", "x"]]
)
def test_an_option_of_the_launchers_after_the_dashes_is_refused_before_anything_starts(
    words: list[str], tmp_path: Path
) -> None:
    done = launcher(
        "up", "--engine", "local", "--cpu", "1", "--", "--data", "bccd.yaml", *words, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {words[0]}: after `--`, where the trainer would get it; ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--epohs", "3"],
            "unrecognized arguments: --epohs 3 (did you mean '--epochs'?); see train.py --help",
        ),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--epochs", "0"], "--epochs=0: must be at least 1"),
        (["--cach", "disc"], "argument --cache: invalid choice: 'disc'"),
        (["--sampler", "gp"], "--sampler: belongs to a search; add --evolve N, or leave it out"),
        (["--data"], "argument --data: expected one argument"),
    ],
)
def test_training_arguments_that_no_trainer_takes_are_refused_before_anything_starts(
    words: list[str], message: str, tmp_path: Path
) -> None:
    done = launcher(
        "up", "--engine", "local", "--cpu", "2", "--", "--data", "bccd.yaml", *words, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_that_only_the_trainer_sees_is_told_by_status(tmp_path: Path) -> None:
    (tmp_path / "hyp.yaml").write_text("lr0: 0.01\nmomentun: 0.9\n")
    training = ("--data", "bccd.yaml", "--weights", "", "--cfg", "yolov5n.yaml", "--hyp", "hyp.yaml")
    up = launcher("up", "--engine", "local", "--cpu", "1", "--", *training, cwd=tmp_path)
    assert up.returncode == 0, up.stderr
    engine = LocalEngine(tmp_path / "runs", os.getuid())
    try:
        wait_until(lambda: engine.list()[0].phase == "exited", 60)
        status = launcher("status", "--engine", "local", cwd=tmp_path)
        words = "unknown hyperparameter 'momentun' (did you mean 'momentum'?)"
        assert "exited 2: usage or configuration error: " in status.stdout
        assert words in status.stdout
    finally:
        for state in engine.list():
            engine.remove(state.id)


def test_kill_all_does_not_act_without_an_answer(tmp_path: Path, running: LocalEngine) -> None:
    done = launcher("kill-all", "--engine", "local", cwd=tmp_path)
    assert done.returncode == 2
    assert "--yes" in done.stderr
    assert [state.phase for state in running.list()] == ["running"]
    assert launcher("kill-all", "--engine", "local", "--json", cwd=tmp_path).returncode == 2
    killed = launcher("kill-all", "--engine", "local", "--yes", "--json", cwd=tmp_path)
    assert (killed.returncode, json.loads(killed.stdout)) == (0, {"removed": ["a-b-cpu0"]})
    assert running.list() == []


def test_attach_says_that_it_watches_only_what_is_there_and_alive(
    tmp_path: Path, running: LocalEngine
) -> None:
    wrong = launcher("attach", "--engine", "local", "nope", cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert wrong.stderr.startswith("error: nope: no such replica")
    running.kill(running.list()[0].id)
    wait_until(lambda: not running.list()[0].live)
    dead = launcher("attach", "--engine", "local", "a-b-cpu0", cwd=tmp_path)
    assert (dead.returncode, dead.stderr) == (1, "a-b-cpu0: killed (137)\n")
    running.remove(running.list()[0].id)


@pytest.fixture
def running(tmp_path: Path) -> LocalEngine:
    """One sleeping replica of ours below `tmp_path/runs`, ended after the test."""
    from launcher.devices.devices import Device
    from launcher.engines.base import ReplicaSpec

    runs = tmp_path / "runs"
    runs.mkdir()
    engine = LocalEngine(runs, os.getuid())
    spec = ReplicaSpec(
        name="a-b-cpu0",
        fleet="a/b",
        device=Device("cpu", "0"),
        image="",
        image_id="",
        command=(sys.executable, "-c", "import time; time.sleep(30)"),
        environment={},
        runs=runs,
    )
    engine.start(engine.create(spec))
    return engine


def test_a_forged_or_stale_record_never_ends_another_process(tmp_path: Path, running: LocalEngine) -> None:
    """A reused pid has another start; a forged record names a process that is no supervisor. Both are spared."""
    bystander = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(30)"], start_new_session=True
    )
    path = tmp_path / "runs/.launcher/a-b-cpu0.json"
    original = path.read_text()
    record = json.loads(original)
    try:
        stat = stat_of(bystander.pid)
        assert stat is not None
        for pid, start in ((bystander.pid, stat.start), (record["pid"], 1)):
            path.write_text(json.dumps({**record, "pid": pid, "start_time": start}))
            [state] = running.list()
            assert state.phase == "exited"
            running.kill(state.id)
            running.terminate(state.id)
        assert bystander.poll() is None
        path.write_text(original)
        assert [state.phase for state in running.list()] == ["running"]
    finally:
        os.killpg(bystander.pid, signal.SIGKILL)
        bystander.wait()
        path.write_text(original)
        running.remove(running.list()[0].id)


def test_a_replica_from_before_a_reboot_is_dead_whoever_has_its_number_now(
    tmp_path: Path, running: LocalEngine
) -> None:
    path = tmp_path / "runs/.launcher/a-b-cpu0.json"
    original = path.read_text()
    path.write_text(json.dumps({**json.loads(original), "boot": "another"}))
    try:
        [state] = running.list()
        assert (state.phase, state.exit_code, state.well) == ("exited", 137, False)
        running.kill(state.id)
    finally:
        path.write_text(original)
    [state] = running.list()
    assert state.phase == "running"
    running.remove(state.id)


def test_a_log_flood_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LOG_BYTES", 1000)
    log = supervisor.RotatedLog(supervisor.open_folder(str(tmp_path / "log")), "log")
    for _ in range(200):
        log.write(b"x" * 99 + b"\n")
    assert len(list(tmp_path.iterdir())) == supervisor.LOG_FILES
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= supervisor.LOG_FILES * 1200


@pytest.mark.parametrize("socket_is", ["absent", "hung"])
def test_a_dead_or_hung_docker_is_told_in_under_five_seconds(socket_is: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        if socket_is == "hung":
            listener.bind(str(path))
            listener.listen()
        start = time.monotonic()
        done = launcher("status", cwd=tmp_path, DOCKER_HOST=f"unix://{path}")
    assert time.monotonic() - start < 5
    assert done.returncode == 5
    assert "Docker does not answer" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_engine_elsewhere_that_does_not_answer_is_told_with_its_address(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        done = launcher("status", "--host", address, cwd=tmp_path)
    assert done.returncode == 5
    assert done.stderr.startswith(f"error: Docker at {address} does not answer (connection refused); ")
