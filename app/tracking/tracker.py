"""The one protocol a tracker implements, and the two ways in which it may fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from app.errors import StarlingError


class TrackerUnavailableError(StarlingError):
    """The tracker cannot be reached or is out of order: the event is kept and sent again later."""


class TrackerRejectedError(StarlingError):
    """The tracker will never take this event: it is counted and left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run as its `run_start` event describes it."""

    uuid: str
    """Ours, kept in the checkpoints: a run that is resumed or sent twice is found by it."""
    name: str
    project: str
    time: float
    """Seconds since the epoch."""
    parent_uuid: str | None = None
    parent_name: str = ""
    params: Mapping[str, Any]
    tags: Mapping[str, Any]


class Tracker(Protocol):
    """Where runs are shown. Each call may be repeated: the second one changes nothing.

    Every method but `destination` and `close` raises TrackerUnavailableError or TrackerRejectedError, and waits
    for seconds at most.
    """

    name: str

    def destination(self, log_dir: Path) -> str:
        """Name the place events go to, without secrets; another place has a cursor of its own."""
        ...

    def start_run(self, run: Run) -> str:
        """Find the run by its UUID, or create it (and its parent); return the tracker's own id of it."""
        ...

    def log_metrics(self, run_id: str, values: Mapping[str, float], *, step: int, time: float) -> None:
        """Record values at a step; `time` in seconds since the epoch."""
        ...

    def log_artifact(self, run_id: str, path: Path, folder: str) -> None:
        """Store the file `path` under `folder` ('' is the top), replacing one of the same name."""
        ...

    def end_run(self, run_id: str, status: str, reason: str, *, time: float) -> None:
        """Record how the run ended: finished, failed, killed or pruned."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...
