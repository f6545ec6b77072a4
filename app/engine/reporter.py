"""Tell the world how a run goes: lines for people, a status file for the launcher, events for the trackers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.engine.progress import Progress, duration
from app.engine.results import EpochRow
from app.outputs.worker_status import WorkerStatus
from app.tracking.events import RUN_ARTIFACTS, EventLog

STATUS_EVERY_S = 2.0
_PHASES = {"finished": "done", "failed": "failed", "killed": "stopped", "pruned": "done"}
"""How a run ended -> what its worker's status says."""


@dataclass(frozen=True, slots=True)
class RunLabel:
    """Who a run is, for trackers and people."""

    uuid: str
    project: str
    name: str
    parent: Mapping[str, str] | None = None
    """UUID and name of the search that this run is a candidate of."""


class Reporter:
    """Fan out what happens in one run, to as many as there are. Keeps monotonic time; holds no training state."""

    def __init__(
        self,
        label: RunLabel,
        run_path: Path,
        *,
        progress: Progress,
        status: WorkerStatus | None = None,
        events: EventLog | None = None,
        artifacts: Mapping[str, str] = RUN_ARTIFACTS,
        memory_bytes: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label = label
        self.progress = progress
        self._run_path = run_path
        self._status = status
        self._events = events
        self._artifacts = artifacts
        self._memory_bytes = memory_bytes
        self._clock = clock
        self._status_at = -STATUS_EVERY_S
        self._epoch_started = clock()
        self._epoch_seconds: list[float] = []

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.progress.say(line)

    def started(self, params: dict[str, Any], tags: dict[str, str]) -> None:
        """Tell that the run begins or goes on."""
        self._event("run_start", project=self.label.project, name=self.label.name, parent=self.label.parent,
                    params=params, tags=tags, dir=self._run_path)  # fmt: skip
        self._update(phase="starting", run_dir=str(self._run_path), message=None, lasting=None)

    def epoch_began(self) -> None:
        """Start the epoch's clock."""
        self._epoch_started = self._clock()

    def iteration(
        self,
        epoch: int,
        epochs: int,
        done: int,
        total: int,
        images: int,
        losses: Callable[[], tuple[float, ...]],
    ) -> None:
        """Show progress within an epoch. `losses` is called, and a device read, only when a line is due."""
        elapsed = max(self._clock() - self._epoch_started, 1e-9)
        left = self._time_left(epochs - epoch - 1, elapsed * total / done, elapsed)
        rate = images / elapsed

        def line() -> str:
            box, obj, cls = losses()
            return (
                f"epoch {epoch + 1}/{epochs}  {done}/{total}  box {box:.4f}  obj {obj:.4f}  cls {cls:.4f}  "
                f"{rate:.0f} img/s  {self._memory_bytes() / 2**30:.1f} GiB  left {duration(left)}"
            )

        self.progress.show(line)
        if self._clock() - self._status_at >= STATUS_EVERY_S:
            self._status_at = self._clock()
            self._update(phase="training", epoch=epoch + 1, epochs=epochs, images_per_s=round(rate, 1),
                                eta_s=round(left))  # fmt: skip

    def epoch_ended(self, row: EpochRow, epochs: int, images: int, best: bool) -> None:
        """Tell the figures of a finished epoch."""
        seconds = max(self._clock() - self._epoch_started, 1e-9)
        self._epoch_seconds.append(seconds)
        left = self._time_left(epochs - row.epoch - 1, seconds, seconds)
        box, obj, cls = row.train_losses
        line = f"epoch {row.epoch + 1}/{epochs}  box {box:.4f}  obj {obj:.4f}  cls {cls:.4f}"
        if row.validated:
            precision, recall, map50, map5095 = row.metrics
            line += f"  P {precision:.3f}  R {recall:.3f}  mAP50 {map50:.3f}  mAP50-95 {map5095:.3f}"
            line += " *" if best else ""
        line += f"  {images / seconds:.0f} img/s  {self._memory_bytes() / 2**30:.1f} GiB"
        self.say(
            line + (f"  left {duration(left)}" if row.epoch + 1 < epochs else f"  took {duration(seconds)}")
        )
        self._event("metrics", step=row.epoch, values=row.values())
        fitness = row.fitness if row.validated else None
        self._update(phase="training", epoch=row.epoch + 1, epochs=epochs, fitness=fitness,
                            images_per_s=round(images / seconds, 1), eta_s=round(left))  # fmt: skip

    def ended(self, status: str, reason: str = "", *, lasting: bool = False) -> None:
        """Tell why the run is over (finished, failed, killed or pruned), and which files it leaves.

        `lasting` says of a failure that it would come again.
        """
        if self._events is not None:
            self._events.announce(self._run_path, self._artifacts, run=self.label.uuid)
        self._event("run_end", status=status, reason=reason)
        if self.label.parent is None:  # a candidate's end is not its worker's
            self._update(phase=_PHASES[status], message=reason or None, lasting=lasting or None)

    def _event(self, kind: str, **fields: Any) -> None:
        if self._events is not None:
            self._events.append(kind, run=self.label.uuid, **fields)

    def _update(self, **fields: Any) -> None:
        if self._status is not None:
            self._status.update(**fields)

    def _time_left(self, epochs_left: int, this_epoch: float, elapsed: float) -> float:
        """Return the seconds left: the rest of this epoch, and the mean epoch for each to come."""
        recent = self._epoch_seconds[-10:] or [this_epoch]
        return this_epoch - elapsed + epochs_left * sum(recent) / len(recent)
