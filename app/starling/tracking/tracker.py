"""The protocol that every tracker implements, and its two errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from starling.core.errors import StarlingError


class TrackerUnavailableError(StarlingError):
    """The tracker is unreachable or does not work: the event is kept and sent again later."""


class TrackerRejectedError(StarlingError):
    """The tracker will never accept this event: the event is counted and left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run, as described by its `run_start` event."""

    uuid: str
    """The run's own id, kept in checkpoints: it identifies a run that is resumed or sent twice."""
    name: str
    project: str
    time: float
    """Seconds since the epoch."""
    directory: Path = Path()
    """The run directory with the run's files."""
    parent_uuid: str | None = None
    parent_name: str = ""
    params: Mapping[str, Any]
    tags: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetInput:
    """A dataset that a run reads, as described by its `dataset` event."""

    role: str
    """train or val."""
    name: str
    digest: str
    """Digest of its images and labels."""
    source: str
    """Path or URL that the dataset was read from."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Counts: images, objects."""
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFile:
    """Weights that a run offers as a model, as described by its `model` event."""

    path: Path
    name: str
    """best, last, or epochN for `--save-period`."""
    step: int
    """The epoch of the weights."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the weights, by name."""


class Tracker(Protocol):
    """A destination for runs. Each call may be repeated: the second call changes nothing.

    Every method but `destination` and `close` raises TrackerUnavailableError or TrackerRejectedError, and waits
    for seconds at most. Each tracker has its own bridge process, and one thread calls its methods.
    """

    name: str

    def destination(self, log_dir: Path) -> str:
        """Name the destination of events, without secrets; each destination has its own cursor."""
        ...

    def start_run(self, run: Run) -> str:
        """Find the run by its UUID, or create the run and its parent; return the tracker's id of the run."""
        ...

    def log_metrics(self, run_id: str, values: Mapping[str, float], *, step: int, time: float) -> None:
        """Record values at a step; `time` in seconds since the epoch."""
        ...

    def log_dataset(self, run_id: str, dataset: DatasetInput) -> None:
        """Record a dataset that the run reads."""
        ...

    def log_image(self, run_id: str, path: Path, name: str, *, step: int, time: float) -> None:
        """Show the image `path` in the series `name` at a step; images of other steps stay."""
        ...

    def log_artifact(self, run_id: str, path: Path, folder: str, *, kind: str = "") -> None:
        """Store the file `path` under `folder` ('' is the top), replacing a file of the same name.

        `kind` is the kind in the event: config, table, plot, report, weights, diff.
        """
        ...

    def log_model(self, run_id: str, model: ModelFile) -> None:
        """Offer weights as a model of the run; a separate event sends them as an artifact too."""
        ...

    def log_console(self, run_id: str, line: str, so_far: Callable[[], str], *, time: float) -> None:
        """Show a line of the console. A tracker that can only replace text sends all of it, `so_far()`, in `flush`."""
        ...

    def log_system(self, run_id: str, values: Mapping[str, float], *, step: int, time: float) -> None:
        """Record a sample of the machine; `step` is the number of seconds since the start of the run."""
        ...

    def flush(self, *, last: bool = False) -> None:
        """Send postponed data if it is due; with `last`, in any case. Called after each look at the log."""
        ...

    def end_run(self, run_id: str, status: str, reason: str, *, time: float) -> None:
        """Record how the run ended: finished, failed, killed or pruned."""
        ...

    def close(self) -> None:
        """Close connections."""
        ...
