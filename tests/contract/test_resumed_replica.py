"""A replica with a real training: it crashes, is stopped, is brought up again, and stays one run all along."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from starling import settings
from tests.conftest import PYTHON_PATH
from tests.waiting import wait_until

REPLICA = "train-one-cpu0"
Launcher = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def launcher(runs: Path, tmp_path: Path) -> Iterator[Launcher]:
    """Return the command line with the local engine, on the test's own runs folder."""
    settings.update({"mlflow": False})

    def run(command: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "launcher", command, "--engine", "local", *words],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": PYTHON_PATH}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False, timeout=90,
        )  # fmt: skip

    yield run
    run("kill-all", "--yes")


def test_a_training_that_crashes_is_stopped_and_brought_up_again_is_one_run(
    launcher: Launcher, tiny_args: list[str], runs: Path
) -> None:
    up = ("--cpu", "1", "--settle", "0.5", "--", *tiny_args[:-2], "--epochs", "9999", "--noplots", "--noval",
          "--name", "one")  # fmt: skip
    done = launcher("up", *up)
    assert done.returncode == 0, done.stderr
    wait_until(lambda: told(runs).get("epoch", 0) >= 2)
    trainer = psutil.Process(told(runs)["pid"])
    time.sleep(
        max(0.0, trainer.create_time() + 5.5 - time.time())
    )  # sooner it would be a failure at the start

    reached = told(runs)["epoch"]
    trainer.kill()
    wait_until(lambda: told(runs)["pid"] != trainer.pid and told(runs).get("epoch", 0) >= reached)
    assert "killed by SIGKILL; starting it again in 4 s (1 of 3)" in launcher("logs").stdout
    [row] = json.loads(launcher("status", "--json").stdout)["replicas"]
    assert (row["state"], row["restarts"]) == ("running", 1)
    assert resumed_at(launcher)[0] >= reached

    done = launcher("stop")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stopped 143: resumable" in done.stdout
    reached = told(runs)["epoch"]
    assert launcher("up", *up).returncode == 0
    wait_until(lambda: resumed_at(launcher))
    assert resumed_at(launcher)[0] >= reached
    assert [path.name for path in (runs / "train").iterdir()] == ["one"]


def told(runs: Path) -> dict[str, Any]:
    """Return what the trainer says of itself: read here, as a `launcher status` ten times a second would slow it."""
    try:
        status: dict[str, Any] = json.loads((runs / f".workers/{REPLICA}.json").read_text())
    except FileNotFoundError:
        return {}
    return {"pid": 0} | status


def resumed_at(launcher: Launcher) -> list[int]:
    lines = launcher("logs").stdout
    return [int(epoch) for epoch in re.findall(r"^resuming .* at epoch (\d+)/", lines, re.MULTILINE)]
