"""Run a trial that is a ClearML task: in a process here, or on the agents of a queue."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import Protocol

from starling.core import package
from starling.core.files.safe_open import make_folder, open_file
from starling.tracking.clearml.client.api import ClearmlApi, ClearmlRefusedError
from starling.tracking.clearml.client.tasks import TASK_VARIABLE, enqueue

STOP_S = 30.0
"""Maximum seconds for a stopped training to save."""


class TrialRunner(Protocol):
    """Runs tasks; the server knows their state."""

    def start(self, task: str) -> None:
        """Start a task, or arrange that it will start."""
        ...

    def ended(self, task: str) -> int | None:
        """Return the exit code of an ended task; None while it runs, or if only the server knows."""
        ...

    def stop(self, task: str) -> None:
        """End a task, wherever it runs."""
        ...

    def conclude(self, task: str, *, reason: str = "") -> None:
        """Set the state of a task whose process has ended; `reason` is the reason of a failure."""
        ...


class LocalRunner:
    """Train in processes on this machine, as an agent does: a process gets the task's id, and reads its arguments."""

    def __init__(self, api: ClearmlApi, output: Path) -> None:
        self._api, self._output = api, output
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, task: str) -> None:
        """Start a training for the task; its output goes to the task, and into a file."""
        make_folder(self._output)
        log = open_file(self.log_of(task), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, alone=True)
        with open(log, "wb") as output:
            self._processes[task] = subprocess.Popen(
                package.command("train"),
                env={
                    **os.environ,
                    TASK_VARIABLE: task,
                    "PYTHONPATH": package.python_path(),
                    "PYTHONUNBUFFERED": "1",
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for the search, which ends its trainings itself.
                start_new_session=True,
            )

    def log_of(self, task: str) -> Path:
        """Return the file with the output of a trial."""
        return self._output / f"{task}.log"

    def ended(self, task: str) -> int | None:
        """Return the process's exit code, None while it runs."""
        return self._processes[task].poll()

    def stop(self, task: str) -> None:
        """End the training with SIGTERM, as a user would; kill it if it does not end."""
        process = self._processes[task]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._api.call(
            "tasks.stopped", task=task, force=True, status_reason="ended by the search", status_message=""
        )

    def conclude(self, task: str, *, reason: str = "") -> None:
        """Set the state, as an agent does."""
        state = "failed" if reason else "completed"
        self._api.call(f"tasks.{state}", task=task, force=True, status_reason=reason, status_message=reason)


class QueueRunner:
    """Let the agents of a queue run the tasks."""

    def __init__(self, api: ClearmlApi, queue: str) -> None:
        self._api, self._queue = api, queue

    def start(self, task: str) -> None:
        """Put the task into the queue."""
        enqueue(self._api, task, self._queue)

    def ended(self, task: str) -> int | None:
        """Return None: the process runs on the agent's machine, and only the server knows its state."""
        return None

    def stop(self, task: str) -> None:
        """Take the task out of the queue, and make an agent that runs it end it."""
        with contextlib.suppress(ClearmlRefusedError):
            self._api.call("tasks.dequeue", task=task)
        with contextlib.suppress(ClearmlRefusedError):
            self._api.call(
                "tasks.stop", task=task, force=True, status_reason="ended by the search", status_message=""
            )

    def conclude(self, task: str, *, reason: str = "") -> None:
        """Do nothing: the agent has set the state."""
