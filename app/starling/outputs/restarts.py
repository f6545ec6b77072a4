"""What a replica's supervisor tells beside what its trainer tells: restarts, and why; one small JSON file a replica."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from starling.errors import refusal
from starling.outputs.atomic import write_atomic
from starling.outputs.worker_status import FOLDER, print_warning, read_status


class RestartRecord:
    """Write `<runs>/.workers/<replica>.restarts.json`. A failure to write is never a reason to stop: it is told once.

    Fields: restarts (so far), max_restarts, exit_code (the last attempt's), oom_killed (the kernel killed one of the
    replica's processes for memory), delay_s (of the wait that goes on); Unix seconds: restart_at (when it ends),
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
        self.path = root / FOLDER / f"{replica}.restarts.json"
        self._status = root / FOLDER / f"{replica}.json"
        self._max_restarts = max_restarts

    def begin(self) -> None:
        """Forget what was told of an earlier replica of this name, but for the run that it left unfinished."""
        self.tell(0)
        run = unfinished_run(self._status)
        known: dict[str, object] = {} if run is None else {"run_dir": run}
        self._write(self._status, {"updated": time.time(), **known})

    def failure_lasts(self) -> bool:
        """Return whether the trainer said of its failure that it would come again."""
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
                self._warn(f"status: {refusal(error, path) or error}; `launcher status` lacks it")
            self._warned = True


def unfinished_run(status: Path) -> str | None:
    """Return the run folder in a worker's status file; None for a run that is done, no such file, or a garbled one."""
    told = read_status(status)
    run = told.get("run_dir")
    return run if isinstance(run, str) and run and told.get("phase") != "done" else None
