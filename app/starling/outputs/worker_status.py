"""What a trainer tells about itself while it works, for `launcher status`: one small JSON file a worker."""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from starling.core.plain_json import parse_json
from starling.errors import refusal
from starling.outputs.atomic import write_atomic
from starling.outputs.folders import read_file

FOLDER = ".workers"
"""Below the runs folder; the launcher reads `<runs>/.workers/<replica>.json`."""


def print_warning(line: str) -> None:
    """Print a line to stderr."""
    print(line, file=sys.stderr, flush=True)


def worker_name(environment: Mapping[str, str] = os.environ) -> str:
    """Return this worker's name: the replica's (`$STARLING_REPLICA`), else host and process id."""
    return environment.get("STARLING_REPLICA") or f"{socket.gethostname()}-{os.getpid()}"


class WorkerStatus:
    """Write what this worker is doing. A failure to write is never a reason to stop training: `warn` is told once.

    Fields: worker, pid, phase (starting, training, validating, waiting, done, failed, stopped), run_dir,
    candidate, epoch, epochs, images_per_s, fitness, best_fitness, finished, budget, eta_s, message, lasting (of a
    failure: it would come again); Unix seconds: search_ends_at (expected), updated. Fields not known yet are absent; a number that is none (NaN) is null.
    """

    def __init__(self, root: Path, worker: str, warn: Callable[[str], None] = print_warning) -> None:
        self.path = root / FOLDER / f"{worker}.json"
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
                    f"status: {refusal(error, self.path) or error}; training goes on, `launcher status` lacks it"
                )
            self._warn = None


def tell_failure(root: Path, worker: str, message: str) -> None:
    """Add why this process has failed to what the worker's file tells, where its run has not told that itself."""
    told = read_status(root / FOLDER / f"{worker}.json")
    if told.get("pid") == os.getpid() and told.get("phase") == "failed":
        return
    status = WorkerStatus(root, worker)
    run = {"run_dir": told["run_dir"]} if "run_dir" in told else {}  # what another try goes on with
    status.update(phase="failed", message=message, **run)


def read_status(path: Path) -> dict[str, object]:
    """Return what a worker's file tells; nothing for one that is absent or garbled."""
    try:
        values = parse_json(read_file(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
