"""Faults of whole replicas on a real engine: stopped, crashed, out of memory, flooded, and watched from a terminal.

The trainer is a double; everything around it is real: the launcher, the engine, the supervisor in the container.
"""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.engines import hardening
from tests.conftest import PYTHON_PATH
from tests.contract.conftest import World, base_image, docker_engine
from tests.contract.test_engines import ended, run
from tests.docker.conftest import docker
from tests.docker.test_launcher_docker import Cli
from tests.docker.test_launcher_docker import cli as cli
from tests.docker.test_launcher_docker import world as world
from tests.trainer_double import build_double
from tests.waiting import wait_until

pytestmark = pytest.mark.docker

TRAINER = """
import os, signal, subprocess, sys, time
def stop(*_):
    print("saved", flush=True)
    raise SystemExit(143)
signal.signal(signal.SIGTERM, stop)
print("up", os.getpid(), flush=True)
hog = "x = bytearray()\\nwhile True: x += b'x' * 5_000_000"
asked = [word for word in sys.argv if word.startswith("memory://hog")]
if os.environ["STARLING_REPLICA"].endswith("cpu0") and asked:
    while not os.path.exists("/usr/src/app/runs/hog"): time.sleep(0.05)
    if asked == ["memory://hog"]: exec(hog)
    subprocess.run([sys.executable, "-c", hog])
    raise SystemExit(0)
for n in range(1200):
    print("epoch", n, flush=True)
    time.sleep(0.1)
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    docker_engine(0)  # skips where there is no engine, or no base image
    tag = f"starling-supervised-test:{uuid.uuid4().hex[:8]}"
    build_double(tmp_path_factory.mktemp("image"), base_image(), tag, TRAINER)
    yield tag
    docker("rmi", "-f", tag)


def rows(cli: Cli) -> tuple[list[dict[str, Any]], int]:
    """Return what `status --json` says of the fleet, and its exit code."""
    done = cli("status", "--json", cli.fleet)
    return json.loads(done.stdout)["replicas"], done.returncode


def inspect(name: str, what: str) -> str:
    return docker("inspect", "-f", what, name).stdout.strip()


def said(cli: Cli) -> list[str]:
    return cli("logs", cli.replica).stdout.splitlines()


@pytest.mark.parametrize("how", ["docker", "launcher"])
def test_a_stop_reaches_the_trainer_through_its_supervisor_and_is_no_failure(cli: Cli, how: str) -> None:
    assert cli.up("--cpu", "1").returncode == 0
    wait_until(lambda: any(line.startswith("up") for line in said(cli)))
    began = time.monotonic()
    if how == "docker":
        assert docker("stop", cli.replica).returncode == 0
    else:
        done = cli("stop", cli.fleet)
        assert done.returncode == 0, done.stderr
        assert f"{cli.replica}: stopped 143: resumable" in done.stdout
    assert time.monotonic() - began < 8, "not by the end of the grace"
    assert inspect(cli.replica, "{{.State.ExitCode}}") == "143"
    assert said(cli)[-1] == "saved"
    [row], code = rows(cli)
    assert (row["state"], row["restarts"], code) == ("stopped 143: resumable", 0, 0)


def test_a_trainer_out_of_memory_is_told_with_the_limit_not_tried_again_and_spares_its_sibling(
    cli: Cli,
) -> None:
    assert cli.up("--cpu", "2", training=("--bucket", "memory://hog")).returncode == 0
    (cli.folder / "runs" / "hog").touch()
    wait_until(lambda: inspect(cli.replica, "{{.State.Status}}") == "exited")
    assert inspect(cli.replica, "{{.State.OOMKilled}} {{.State.ExitCode}}") == "true 137"
    (killed, sibling), code = rows(cli)
    assert (killed["state"], killed["restarts"]) == ("OOM-KILLED at 128 MB", 0)
    assert (sibling["state"], sibling["oom_killed"]) == ("running", False)
    assert code == 1
    assert "out of memory, and a restart would be too: give it more --memory" in said(cli)[-1]
    restarts = json.loads((cli.folder / f"runs/.workers/{cli.replica}.restarts.json").read_text())
    assert restarts["oom_killed"] is True, "the supervisor reads the same counter as the engine"


def test_a_killed_child_behind_exit_code_0_is_never_called_success(cli: Cli) -> None:
    assert cli.up("--cpu", "1", training=("--bucket", "memory://hog/child")).returncode == 0
    (cli.folder / "runs" / "hog").touch()
    wait_until(lambda: inspect(cli.replica, "{{.State.Status}}") == "exited")
    assert inspect(cli.replica, "{{.State.OOMKilled}} {{.State.ExitCode}}") == "true 0"
    [row], code = rows(cli)
    assert row["state"] == "a child was OOM-KILLED at 128 MB, exited 0 nevertheless"
    assert code == 1


def test_a_crash_is_told_waited_for_and_started_again_in_the_same_container(cli: Cli) -> None:
    assert cli.up("--cpu", "1").returncode == 0
    wait_until(
        lambda: "epoch 56" in said(cli), 30
    )  # at ten a second; before 5 s it would be a failure at the start
    before = inspect(cli.replica, "{{.Id}} {{.State.StartedAt}}")
    [first] = [line.split()[1] for line in said(cli) if line.startswith("up")]
    docker("exec", cli.replica, "python", "-c", f"import os; os.kill({first}, 11)")
    wait_until(lambda: "starting it again" in said(cli)[-1])
    assert said(cli)[-1] == "supervisor: the trainer was killed by SIGSEGV; starting it again in 4 s (1 of 3)"
    table = cli("status", cli.fleet)
    assert "restarting in " in table.stdout
    assert " (1 of 3)" in table.stdout
    assert table.returncode == 0
    wait_until(lambda: sum(line.startswith("up") for line in said(cli)) == 2, 30)
    [row], code = rows(cli)
    assert (row["state"], row["restarts"], row["max_restarts"], code) == ("running", 1, 3, 0)
    assert inspect(cli.replica, "{{.Id}} {{.State.StartedAt}}") == before


def test_ctrl_c_typed_into_attach_leaves_the_replica_alone(cli: Cli) -> None:
    assert cli.up("--cpu", "1").returncode == 0
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(cli.folder)
        environment = {**os.environ, "PYTHONPATH": PYTHON_PATH}
        os.execvpe(sys.executable, [sys.executable, "-m", "launcher", "attach", cli.replica], environment)
    shown = read_until(terminal, b"epoch")
    os.write(terminal, b"\x03")
    shown += read_until(terminal, b"it goes on")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0
    assert b"Traceback" not in shown
    assert inspect(cli.replica, "{{.State.Running}}") == "true"
    before = len(said(cli))
    wait_until(lambda: len(said(cli)) > before)


def test_attach_ends_with_the_replica_and_says_how(cli: Cli) -> None:
    assert cli.up("--cpu", "1").returncode == 0
    words = [sys.executable, "-m", "launcher", "attach", cli.replica]
    watching = subprocess.Popen(
        words, cwd=cli.folder, env={**os.environ, "PYTHONPATH": PYTHON_PATH}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert watching.stdout is not None
    watching.stdout.readline()
    docker("kill", cli.replica)
    _, errors = watching.communicate(timeout=20)
    assert watching.returncode == 1
    assert f"{cli.replica}: killed (137)" in errors


def test_watch_on_a_terminal_is_one_live_table_and_whole_lines_in_a_pipe(cli: Cli) -> None:
    assert cli.up("--cpu", "1").returncode == 0
    words = [sys.executable, "-m", "launcher", "status", "--watch", "--interval", "0.3", cli.fleet]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(cli.folder)
        os.execvpe(
            sys.executable,
            words,
            {**os.environ, "PYTHONPATH": PYTHON_PATH, "TERM": "xterm", "COLUMNS": "120"},
        )
    shown = read_until(terminal, b"\x1b[1A")  # the cursor goes up: the table is drawn over
    os.write(terminal, b"\x03")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0
    assert cli.replica.encode() in shown
    piped = subprocess.Popen(words, cwd=cli.folder, env={**os.environ, "PYTHONPATH": PYTHON_PATH},
                             stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert piped.stdout is not None
    lines = [piped.stdout.readline() for _ in range(4)]
    piped.kill()
    piped.communicate()
    assert [line.split()[0] for line in lines] == ["replica", cli.replica] * 2
    assert "\x1b" not in "".join(lines)


def read_until(terminal: int, sign: bytes, limit_s: float = 20) -> bytes:
    """Return what a terminal shows until `sign` is in it."""
    shown, deadline = b"", time.monotonic() + limit_s
    while sign not in shown:
        assert time.monotonic() < deadline, shown
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
    assert sign in shown, shown
    return shown


def test_a_log_flood_is_bounded_on_the_disk_and_its_last_lines_are_there(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardening, "LOG_FILE_SIZE", "100k")
    replica_id = run(world, "for n in range(20_000): print(n, 'x' * 100)")
    ended(world.engine, replica_id)
    wait_until(lambda: next(world.engine.logs(replica_id, tail=1)).startswith("19999 "))
    path = Path(inspect(replica_id, "{{.LogPath}}"))
    if not path.exists():
        pytest.skip("this engine keeps its logs where this user cannot look")
    sizes = [file.stat().st_size for file in path.parent.glob(f"{path.name}*")]
    assert len(sizes) == 3
    assert sum(sizes) < 3 * 120_000
    kept = [int(line.split()[0]) for line in world.engine.logs(replica_id)]
    assert kept == list(range(kept[0], 20_000))
