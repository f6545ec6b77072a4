"""The one protocol a tracker implements, and the two ways in which it may fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from starling.core.errors import StarlingError


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
    directory: Path = Path()
    """The run directory, where its files are."""
    parent_uuid: str | None = None
    parent_name: str = ""
    params: Mapping[str, Any]
    tags: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetInput:
    """A dataset that a run reads, as its `dataset` event describes it."""

    role: str
    """train or val."""
    name: str
    digest: str
    """Of its images and labels."""
    source: str
    """Where it was read from: a path or a URL."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Counts: images, objects."""
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFile:
    """Weights that a run offers as a model, as its `model` event describes them."""

    path: Path
    name: str
    """best, last, or epochN of `--save-period`."""
    step: int
    """The epoch they come from."""
    values: Mapping[str, float] = field(default_factory=dict)
    """What they reached, by metric name."""


class Tracker(Protocol):
    """Where runs are shown. Each call may be repeated: the second one changes nothing.

    Every method but `destination` and `close` raises TrackerUnavailableError or TrackerRejectedError, and waits
    for seconds at most. A tracker has a bridge process of its own, and its methods are called by one thread.
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

    def log_dataset(self, run_id: str, dataset: DatasetInput) -> None:
        """Record a dataset that the run reads."""
        ...

    def log_image(self, run_id: str, path: Path, name: str, *, step: int, time: float) -> None:
        """Show the image `path` as the series `name` at a step: those of other steps stay."""
        ...

    def log_artifact(self, run_id: str, path: Path, folder: str, *, kind: str = "") -> None:
        """Store the file `path` under `folder` ('' is the top), replacing one of the same name.

        `kind` is what the event says it is: config, table, plot, report, weights, diff.
        """
        ...

    def log_model(self, run_id: str, model: ModelFile) -> None:
        """Offer weights as a model of the run; they are an artifact besides, of an event of its own."""
        ...

    def log_console(self, run_id: str, line: str, so_far: Callable[[], str], *, time: float) -> None:
        """Show a line of the console. A tracker that can only replace takes all of it, `so_far()`, in `flush`."""
        ...

    def log_system(self, run_id: str, values: Mapping[str, float], *, step: int, time: float) -> None:
        """Record a sample of the machine; `step` is the seconds since the run began."""
        ...

    def flush(self, *, last: bool = False) -> None:
        """Send what was put off, if it is time; `last`: in any case. Called after each look at the log."""
        ...

    def end_run(self, run_id: str, status: str, reason: str, *, time: float) -> None:
        """Record how the run ended: finished, failed, killed or pruned."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...
