"""The engine is killed under replicas at work, and comes back; the machine loses power. The engine is a private one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PYTHON_PATH
from tests.contract.conftest import base_image
from tests.docker.private_engine import PrivateEngine, private_engine
from tests.trainer_double import build_double
from tests.waiting import wait_until

pytestmark = pytest.mark.docker

IMAGE = "starling-restart:test"
TRAINER = """
import os, pathlib, signal, time
signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
done = pathlib.Path(os.environ["STARLING_RUNS"]) / ("done-" + os.environ["STARLING_REPLICA"])
first = int(done.read_text()) if done.exists() else 0
for n in range(first, 9999):
    done.with_suffix(".part").write_text(str(n))
    done.with_suffix(".part").rename(done)
    print("epoch", n, flush=True)
    time.sleep(0.05)
"""
UP = ("up", "--cpu", "2", "--image", IMAGE, "--memory", "128m", "--network", "none", "--settle", "0.5", "--",
      "--project", "test", "--name", "restart")  # fmt: skip
REPLICAS = ["test-restart-cpu0", "test-restart-cpu1"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateEngine]:
    base = base_image()
    with private_engine() as engine:
        engine.load(base)
        build_double(tmp_path_factory.mktemp("context"), base, IMAGE, TRAINER, engine.address)
        engine.kill()
        yield engine


class Commands:
    """The command line against the private engine, from a folder of its own."""

    def __init__(self, engine: PrivateEngine, folder: Path) -> None:
        self._folder = folder
        self._environment = {**os.environ, "PYTHONPATH": PYTHON_PATH, "DOCKER_HOST": engine.address}

    def begin(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "launcher", *words], cwd=self._folder, env=self._environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, *words: str) -> tuple[int, str, str]:
        process = self.begin(*words)
        output, errors = process.communicate(timeout=60)
        return process.returncode, output, errors

    def states(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self("status", "--json")[1])["replicas"]
        return rows

    def epoch(self, replica: str) -> int:
        return int((self._folder / "runs" / f"done-{replica}").read_text())


def assert_equal_to_inspect(rows: list[dict[str, Any]], engine: PrivateEngine) -> None:
    for row in rows:
        [inspected] = json.loads(engine.docker("inspect", row["id"]).stdout)
        state = inspected["State"]
        assert inspected["Name"] == f"/{row['replica']}"
        assert row["phase"] == state["Status"]
        assert row["exit_code"] == (None if state["Running"] else state["ExitCode"])
        assert row["oom_killed"] == state["OOMKilled"]
        assert row["started_at"][:19] == state["StartedAt"][:19]


def test_a_killed_engine_that_comes_back_finds_its_replicas_or_up_resumes_them(
    engine: PrivateEngine, tmp_path: Path
) -> None:
    engine.start("--live-restore")
    launcher = Commands(engine, tmp_path)
    code, _, errors = launcher(*UP)
    assert code == 0, errors
    pids = [engine.docker("inspect", "-f", "{{.State.Pid}}", name).stdout for name in REPLICAS]
    following = launcher.begin("logs", "--follow", REPLICAS[0])
    watching = launcher.begin("status", "--watch", "--interval", "0.2")
    assert following.stdout is not None
    assert watching.stdout is not None
    watching.stdout.readline()
    lines = [following.stdout.readline() for _ in range(10)]

    engine.kill()
    began = time.monotonic()
    code, _, errors = launcher("status")
    assert (code, time.monotonic() - began < 5) == (5, True)
    assert "Docker does not answer (connection refused)" in errors

    engine.start("--live-restore")
    rows = launcher.states()
    assert [row["phase"] for row in rows] == ["running"] * 2
    assert_equal_to_inspect(rows, engine)
    assert [engine.docker("inspect", "-f", "{{.State.Pid}}", name).stdout for name in REPLICAS] == pids
    code, output, _ = launcher(*UP)
    assert code == 0
    assert f"already running: {', '.join(REPLICAS)}" in output

    reached = launcher.epoch(REPLICAS[0])
    while int(lines[-1].split()[1]) < reached + 5:
        lines.append(following.stdout.readline())
    assert [int(line.split()[1]) for line in lines] == list(range(len(lines))), "a line twice, or one lost"
    watching.terminate()
    seen, _ = watching.communicate()
    _, silence, afterwards = seen.rpartition("asking again")
    assert silence, "it waits for the engine"
    assert REPLICAS[1] in afterwards

    engine.kill()
    engine.start()  # without live-restore it ends what it finds
    rows = launcher.states()
    assert [row["phase"] for row in rows] == ["exited"] * 2
    assert_equal_to_inspect(rows, engine)
    following.communicate(timeout=30)
    assert_resumes(launcher)

    engine.lose_power()
    engine.start()
    rows = launcher.states()
    assert_equal_to_inspect(rows, engine)
    code, output, _ = launcher("status")
    assert code == 1
    assert output.count("lost with the engine or the machine (255)") == 2, output
    assert_resumes(launcher)


def assert_resumes(launcher: Commands) -> None:
    """The same command starts both again, each from where it was."""
    reached = [launcher.epoch(name) for name in REPLICAS]
    code, output, errors = launcher(*UP)
    assert code == 0, errors
    assert output.count("starting it again") == 2
    assert [row["state"] for row in launcher.states()] == ["running"] * 2
    for name, epoch in zip(REPLICAS, reached, strict=True):
        wait_until(lambda name=name: launcher("logs", name)[1])
        assert launcher("logs", name)[1].startswith(f"epoch {epoch}\n")
        wait_until(lambda name=name, epoch=epoch: launcher.epoch(name) > epoch)
