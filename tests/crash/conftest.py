"""Processes to kill: trainers forked off one that has torch imported, and programs under strace."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.crash.children import Fault, run_trainer

PROCESSES = multiprocessing.get_context("forkserver")


class Trainer:
    """A trainer process and what it said."""

    def __init__(self, process: ForkServerProcess, output: Path) -> None:
        self.process, self._output = process, output
        process.start()

    @property
    def output(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def send(self, signum: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signum)

    def wait(self, timeout_s: float = 60) -> int:
        """Return the exit code; negative for a signal."""
        self.process.join(timeout_s)
        assert self.process.exitcode is not None, f"still running after {timeout_s} s:\n{self.output}"
        return self.process.exitcode


Start = Callable[..., Trainer]


@pytest.fixture
def start(runs: Path, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts `train.py` with these arguments and one fault."""
    # Set here, not at import: the first process started decides, and other tests' needs are in it too.
    PROCESSES.set_forkserver_preload(["starling.search.training", "tests.crash.children"])
    started: list[Trainer] = []

    def start_trainer(args: list[str], fault: Fault = (), **environment: str) -> Trainer:
        output = tmp_path / f"output-{len(started)}"
        trainer = Trainer(
            PROCESSES.Process(target=run_trainer, args=(args, str(runs), str(output), fault, environment)),
            output,
        )
        started.append(trainer)
        return trainer

    yield start_trainer
    for trainer in started:
        if trainer.process.is_alive():
            trainer.process.kill()
            trainer.process.join()


def wait_for(path: Path, timeout_s: float = 30) -> None:
    """Wait until a file appears."""
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


Strace = Callable[..., dict[str, list[str]]]


@pytest.fixture
def strace(tmp_path: Path) -> Strace:
    """Return a function that runs a program of `tests.crash.under_strace` with faults injected into system calls."""
    program = shutil.which("strace")
    if program is None:
        reason = "strace is not installed (apt-get install strace)"
        if os.environ.get("STARLING_REQUIRE_DOCKER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)

    def run(action: str, calls: list[str], effect: str) -> dict[str, list[str]]:
        from tests.crash.under_strace import CALLS, NTH

        cases = tmp_path / "cases"
        inject = [f"--inject={CALLS[call]}:{effect}:when={NTH}" for call in calls]
        trace = "--trace=" + ",".join(CALLS[call] for call in calls)
        command = [program, "-f", "-o", os.devnull, trace, *inject,
                   sys.executable, "-m", "tests.crash.under_strace", action, str(cases), *calls]  # fmt: skip
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return dict(json.loads((cases / "ends.json").read_text()))

    return run
