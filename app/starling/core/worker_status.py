"""The status files of a worker and its supervisor, two small JSON files: the trainer writes, `launcher status` reads.

Writers and readers are in one module to stay consistent. The data comes from inside a replica and is not trusted.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from starling.core.files.atomic import write_atomic
from starling.core.files.refusals import refusal
from starling.core.files.safe_open import read_file
from starling.core.plain_json import parse_json
from starling.core.words import printable

FOLDER = ".workers"
"""The folder below the runs folder; the launcher reads `<runs>/.workers/<replica>.json`."""


def status_file(worker: str) -> str:
    """Return the name of a worker's status file."""
    return f"{worker}.json"


def restarts_file(replica: str) -> str:
    """Return the name of the file in which a replica's supervisor records restarts."""
    return f"{replica}.restarts.json"


def print_warning(line: str) -> None:
    """Print a line to stderr."""
    print(line, file=sys.stderr, flush=True)


def worker_name(environment: Mapping[str, str] = os.environ) -> str:
    """Return this worker's name: the replica's name (`$STARLING_REPLICA`), else host and process id."""
    return environment.get("STARLING_REPLICA") or f"{socket.gethostname()}-{os.getpid()}"


class WorkerStatus:
    """Writes this worker's status. A failed write does not stop the training: `warn` is called once.

    Fields: worker, pid, phase (starting, training, validating, waiting, done, failed, stopped), run_dir,
    candidate, epoch, epochs, images_per_s, fitness, best_fitness, finished, budget, eta_s, message, lasting (the
    failure would happen again); Unix seconds: search_ends_at (expected), updated. Unknown fields are missing; NaN and
    infinity are written as null.
    """

    def __init__(self, root: Path, worker: str, warn: Callable[[str], None] = print_warning) -> None:
        self.path = root / FOLDER / status_file(worker)
        self._warn: Callable[[str], None] | None = warn
        self._fields: dict[str, object] = {"worker": worker, "pid": os.getpid(), "phase": "starting"}

    def update(self, **fields: object) -> None:
        """Change the given fields and replace the file."""
        self._fields.update(fields, updated=time.time())
        plain = {key: _finite(value) for key, value in self._fields.items()}
        try:
            write_atomic(self.path, json.dumps(plain, allow_nan=False, default=str))
        except OSError as error:
            if self._warn is not None:
                self._warn(
                    f"status: {refusal(error, self.path) or error}; training goes on, but `launcher status` does not show it"
                )
            self._warn = None


def tell_failure(root: Path, worker: str, message: str) -> None:
    """Write this process's failure into the worker's status file, unless its run has already done so."""
    told = read_status(root / FOLDER / status_file(worker))
    if told.get("pid") == os.getpid() and told.get("phase") == "failed":
        return
    status = WorkerStatus(root, worker)
    run = {"run_dir": told["run_dir"]} if "run_dir" in told else {}  # the run that the next attempt resumes
    status.update(phase="failed", message=message, **run)


def read_status(path: Path) -> dict[str, object]:
    """Return the contents of a worker's status file; empty if the file is missing or invalid."""
    try:
        values = parse_json(read_file(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RestartRecord:
    """Writes `<runs>/.workers/<replica>.restarts.json`. A failed write stops nothing: `warn` is called once.

    Fields: restarts (so far), max_restarts, exit_code (the last attempt's), oom_killed (the kernel killed one of the
    replica's processes for memory), delay_s (of the current wait); Unix seconds: restart_at (the end of the wait),
    updated. Fields that do not apply are null.
    """

    def __init__(
        self,
        root: Path,
        replica: str,
        max_restarts: int,
        warn: Callable[[str], None] = print_warning,
    ) -> None:
        self._warn, self._warned = warn, False
        self.path = root / FOLDER / restarts_file(replica)
        self._status = root / FOLDER / status_file(replica)
        self._max_restarts = max_restarts

    def begin(self) -> None:
        """Reset the files of an earlier replica of this name; keep only the run that it left unfinished."""
        self.tell(0)
        run = unfinished_run(self._status)
        known: dict[str, object] = {} if run is None else {"run_dir": run}
        self._write(self._status, {"updated": time.time(), **known})

    def failure_lasts(self) -> bool:
        """Return whether the trainer reported that its failure would happen again."""
        told = read_status(self._status)
        return told.get("phase") == "failed" and told.get("lasting") is True

    def tell(
        self,
        restarts: int,
        *,
        exit_code: int | None = None,
        oom_killed: bool = False,
        delay_s: float | None = None,
    ) -> None:
        """Replace the record."""
        now = time.time()
        fields: dict[str, object] = {
            "restarts": restarts,
            "max_restarts": self._max_restarts,
            "exit_code": exit_code,
            "oom_killed": oom_killed,
            "delay_s": delay_s,
            "restart_at": None if delay_s is None else now + delay_s,
            "updated": now,
        }
        self._write(self.path, fields)

    def _write(self, path: Path, fields: dict[str, object]) -> None:
        try:
            write_atomic(path, json.dumps(fields))
        except OSError as error:
            if not self._warned:
                self._warn(f"status: {refusal(error, path) or error}; `launcher status` does not show it")
            self._warned = True


def unfinished_run(status: Path) -> str | None:
    """Return the run folder in a worker's status file; None if the run is done, or the file is missing or invalid."""
    told = read_status(status)
    run = told.get("run_dir")
    return run if isinstance(run, str) and run and told.get("phase") != "done" else None


class TrainerStatus(NamedTuple):
    """A trainer's own report of its progress; a value that it has not reported is None."""

    phase: str | None = None
    candidate: str | None = None
    epoch: int | None = None
    epochs: int | None = None
    images_per_s: float | None = None
    best_fitness: float | None = None
    finished: int | None = None
    budget: int | None = None
    eta_s: float | None = None
    search_ends_at: float | None = None
    """The expected end of the whole search in Unix seconds."""
    message: str | None = None
    updated: float | None = None


class Restarts(NamedTuple):
    """A supervisor's report of its trainer's restarts; a value that it has not reported is None."""

    done: int | None = None
    most: int | None = None
    restart_at: float | None = None
    """The end of the wait for the next attempt in Unix seconds; None while the trainer runs."""
    delay_s: float | None = None
    """The length of the whole wait."""
    oom_killed: bool = False
    """Whether the kernel has killed one of the replica's processes for memory."""

    def wait_s(self, now: float) -> float | None:
        """Return the seconds until the next attempt, at most `delay_s` (the clock may change); None without a wait."""
        if self.restart_at is None:
            return None
        return min(max(self.restart_at - now, 0.0), self.delay_s or 0.0)


def progress_in(values: Mapping[str, Any]) -> TrainerStatus:
    """Return the progress in a trainer's file."""
    return TrainerStatus(
        phase=_text(values.get("phase")),
        candidate=_text(values.get("candidate")),
        epoch=_whole(values.get("epoch")),
        epochs=_whole(values.get("epochs")),
        images_per_s=_number(values.get("images_per_s")),
        best_fitness=_number(values.get("best_fitness")),
        finished=_whole(values.get("finished")),
        budget=_whole(values.get("budget")),
        eta_s=_number(values.get("eta_s")),
        search_ends_at=_number(values.get("search_ends_at")),
        message=_text(values.get("message")),
        updated=_number(values.get("updated")),
    )


def restarts_in(values: Mapping[str, Any]) -> Restarts:
    """Return the report in a supervisor's file."""
    return Restarts(
        done=_whole(values.get("restarts")),
        most=_whole(values.get("max_restarts")),
        restart_at=_number(values.get("restart_at")),
        delay_s=_number(values.get("delay_s")),
        oom_killed=values.get("oom_killed") is True,
    )


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def _text(value: Any) -> str | None:
    """Return a short text without control characters, which could control the user's terminal."""
    if value is None or isinstance(value, (dict, list)):
        return None
    return printable(str(value)[:200])
