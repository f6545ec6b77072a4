"""Doubles of a tracker: they stand in for MLflow in tests and say so in their names."""

from __future__ import annotations

import json
import sys
import time as clock
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from starling.core.files.atomic import append_line
from starling.tracking.bridge import follow
from starling.tracking.delivery import Bridge
from starling.tracking.tracker import DatasetInput, ModelFile, Run, TrackerUnavailableError


class RecordingTrackerDouble:
    """Append every call to a file, and keep nothing in memory, as a tracker in another process would."""

    name = "double"

    def __init__(self, calls: Path, *, delay_s: float = 0.0) -> None:
        self.calls = calls
        self.delay_s = delay_s
        self.failures: list[Exception] = []
        """Raised by the next calls, one each."""
        self.last_flush_failure: Exception | None = None

    def destination(self, log_dir: Path) -> str:
        return "double"

    def start_run(self, run: Run) -> str:
        self._record("start", run=run.uuid, parent=run.parent_uuid, params=dict(run.params))
        return f"id-{run.uuid}"

    def log_metrics(self, run_id: str, values: Mapping[str, float], *, step: int, time: float) -> None:
        self._record("metrics", run=run_id, step=step, values=dict(values), time=time)

    def log_dataset(self, run_id: str, dataset: DatasetInput) -> None:
        self._record("dataset", run=run_id, role=dataset.role, digest=dataset.digest, figures=dataset.figures)

    def log_image(self, run_id: str, path: Path, name: str, *, step: int, time: float) -> None:
        self._record("picture", run=run_id, file=path.name, name=name, step=step)

    def log_artifact(self, run_id: str, path: Path, folder: str, *, kind: str = "") -> None:
        self._record("artifact", run=run_id, name=path.name, folder=folder)

    def log_model(self, run_id: str, model: ModelFile) -> None:
        self._record("model", run=run_id, name=model.name, step=model.step, values=model.values)

    def log_console(self, run_id: str, line: str, so_far: Callable[[], str], *, time: float) -> None:
        self._record("console", run=run_id, line=line, so_far=so_far())

    def log_system(self, run_id: str, values: Mapping[str, float], *, step: int, time: float) -> None:
        self._record("system", run=run_id, step=step, values=dict(values))

    def flush(self, *, last: bool = False) -> None:
        if last and self.last_flush_failure is not None:
            raise self.last_flush_failure

    def end_run(self, run_id: str, status: str, reason: str, *, time: float) -> None:
        self._record("end", run=run_id, status=status, reason=reason)

    def close(self) -> None:
        pass

    def _record(self, call: str, **fields: Any) -> None:
        clock.sleep(self.delay_s)
        if self.failures:
            raise self.failures.pop(0)
        append_line(self.calls, json.dumps({"call": call, **fields}))


class UnreachableTrackerDouble(RecordingTrackerDouble):
    """A tracker that is never there."""

    def _record(self, call: str, **fields: Any) -> None:
        raise TrackerUnavailableError("connection refused")


def recorded(calls: Path) -> list[dict[str, Any]]:
    """Return the calls that were recorded, oldest first."""
    return [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


if __name__ == "__main__":
    # A bridge with a double in a process of its own, to be killed: LOG CALLS DELAY_S
    log, calls, delay_s = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    sys.exit(follow(Bridge(log, RecordingTrackerDouble(calls, delay_s=delay_s)), poll_s=0.02))
