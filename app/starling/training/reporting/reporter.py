"""Report the progress of a run: lines for people, a status file for the launcher, events for the trackers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from starling.core.paths import real_path
from starling.core.units import format_duration
from starling.core.worker_status import WorkerStatus
from starling.outputs.run_dir import RunDir
from starling.progress import Progress
from starling.tracking.events import RUN_ARTIFACTS, EventLog, tells_metrics
from starling.training.reporting.hooks import Hook, Hooks, Training
from starling.training.reporting.results import EpochRow

logger = logging.getLogger(__name__)

STATUS_EVERY_S = 2.0
BEST_EVERY_S = 300.0
"""Minimum seconds between two uploads of best.pt; the last best.pt is uploaded in any case."""
_PHASES = {"failed": "failed", "killed": "stopped", "pruned": "done"}
"""How a run ended -> phase in the worker's status file."""


@dataclass(frozen=True, slots=True)
class RunLabel:
    """The identity of a run, for trackers and people."""

    uuid: str
    project: str
    name: str
    parent: Mapping[str, str] | None = None
    """UUID and name of the search, if this run is a candidate of a search."""


class Reporter:
    """Report the events of one run to screen, status file, trackers and hooks. Holds no training state."""

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
        hooks: Mapping[str, Sequence[Hook]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label = label
        self.progress = progress
        self._run_path = run_path
        self._status = status
        self._events = events
        self._artifacts = artifacts
        self._memory_bytes = memory_bytes
        self._hooks = Hooks(hooks or {})
        self._best_sent_at = -BEST_EVERY_S
        self._clock = clock
        self._status_at = -STATUS_EVERY_S
        self._epoch_started = clock()
        self._epoch_seconds: list[float] = []
        self._trained_s = 0.0
        """Seconds from the start of this epoch to the end of its latest iteration."""
        self._beyond = 0.0
        """Seconds that validation and saves took in the last epoch, after its iterations."""

    def hook(self, name: str, **changes: Any) -> None:
        """Call the user's hooks of the event `name`; see `starling.training.reporting.hooks`."""
        self._hooks.fire(name, **changes)

    def offer_hooks(self, training: Training) -> None:
        """Let hooks see this training from here on, and send artifacts and say lines through this reporter."""
        training.log, training.say = self._hook_logs, logger.info
        self._hooks.training = training

    def started(
        self, params: dict[str, Any], tags: dict[str, str], datasets: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Report that the run begins or is resumed, and which datasets it reads."""
        self._event("run_start", project=self.label.project, name=self.label.name, parent=self.label.parent,
                    params=params, tags=tags, dir=self._run_path)  # fmt: skip
        for dataset in datasets:
            self._event("dataset", **dataset)
        if self._events is not None:
            self.progress.listen(lambda line: self._event("message", text=line))
        self._update(phase="starting", run_dir=str(self._run_path), message=None, lasting=None)

    def goes_on_after(self, row: EpochRow) -> None:
        """Report the metrics of the last epoch before a resume, if a kill came before they were reported."""
        if self._events is not None and not tells_metrics(self._events.path, self.label.uuid, row.epoch):
            self._event("metrics", step=row.epoch, values=row.values())

    def epoch_began(self) -> None:
        """Start the epoch's clock."""
        self._epoch_started = self._clock()

    def appeared(self, *paths: Path) -> None:
        """Send new files to the trackers, but only files that match a pattern of `artifacts`."""
        for path in paths:
            kind = self._kind(path)
            if kind is not None and self._events is not None and path.is_file():
                self._events.announce_file(self._run_path, path, kind, run=self.label.uuid)

    def image(self, path: Path, name: str, epoch: int) -> None:
        """Send a plot to the trackers as the image of `epoch` in the series `name`."""
        self._event("picture", path=path.relative_to(self._run_path).as_posix(), name=name, step=epoch)

    def saved(self, row: EpochRow, kept: Path | None, best: Path | None) -> None:
        """Report the weights that an epoch saved: the file of `--save-period`, and the best file so far."""
        if kept is not None:
            self.appeared(kept)
            self._model(kept, kept.stem, row)
        if best is not None and self._clock() - self._best_sent_at >= BEST_EVERY_S:
            self._best_sent_at = self._clock()
            self.appeared(best)

    def iteration(
        self,
        epoch: int,
        epochs: int,
        done: int,
        total: int,
        images: int,
        losses: Callable[[], Mapping[str, float]],
    ) -> None:
        """Show progress within an epoch. `losses` (name to value) is called, and a device read, only when a line is due."""
        elapsed = max(self._clock() - self._epoch_started, 1e-9)
        whole = elapsed * total / done
        left = self._time_left(epochs - epoch - 1, whole + self._beyond, elapsed)
        rate = images / elapsed
        self._trained_s = elapsed

        def line() -> str:
            return (
                f"epoch {epoch + 1}/{epochs}  {done}/{total}  {_words_of(losses())}  "
                f"{rate:.0f} img/s  {self._memory_bytes() / 2**30:.1f} GiB" + _words_for(left)
            )

        self.progress.show(line)
        if self._clock() - self._status_at >= STATUS_EVERY_S:
            self._status_at = self._clock()
            self._update(phase="training", epoch=epoch + 1, epochs=epochs, images_per_s=round(rate, 1),
                                eta_s=_rounded(left))  # fmt: skip

    def epoch_ended(self, row: EpochRow, epochs: int, images: int, best: bool) -> None:
        """Report the metrics of a finished epoch."""
        seconds = max(self._clock() - self._epoch_started, 1e-9)
        self._epoch_seconds.append(seconds)
        self._beyond = seconds - min(self._trained_s, seconds)
        left = self._time_left(epochs - row.epoch - 1, seconds, seconds)
        losses = _words_of(dict(zip(row.losses, row.train_losses, strict=True)))
        line = f"epoch {row.epoch + 1}/{epochs}  {losses}"
        if row.validated:
            precision, recall, map50, map5095 = row.metrics
            line += f"  P {precision:.3f}  R {recall:.3f}  mAP50 {map50:.3f}  mAP50-95 {map5095:.3f}"
            line += " *" if best else ""
        line += f"  {images / seconds:.0f} img/s  {self._memory_bytes() / 2**30:.1f} GiB"
        logger.info(
            line + (_words_for(left) if row.epoch + 1 < epochs else f"  took {format_duration(seconds)}")
        )
        metrics = row.values()
        self.hook("on_fit_epoch_end", epoch=row.epoch, metrics=metrics)
        self._event("metrics", step=row.epoch, values=self._numbers(metrics))
        fitness = row.fitness if row.validated else None
        self._update(phase="training", epoch=row.epoch + 1, epochs=epochs, fitness=fitness,
                            images_per_s=round(images / seconds, 1), eta_s=_rounded(left))  # fmt: skip

    def ended(
        self, status: str, reason: str = "", best: EpochRow | None = None, *, lasting: bool = False
    ) -> None:
        """Report the end of the run (`status`: finished, failed, killed or pruned), its files, and its model.

        `best` is the row of the epoch whose weights are the model; None if there is no model. `lasting`: the failure
        would happen again if the run were repeated.
        """
        self.hook("teardown")
        if self._events is not None:
            self._events.announce(self._run_path, self._artifacts, run=self.label.uuid)
        if best is not None:
            self._model(RunDir(self._run_path).best, "best", best)
        self._event("run_end", status=status, reason=reason)
        self.progress.listen(None)
        # A worker goes on after the end of a candidate. A finished run is done only after its results are delivered.
        if self.label.parent is None and status != "finished":
            self._update(phase=_PHASES[status], message=reason or None, lasting=lasting or None)

    def done(self) -> None:
        """Report that a finished run has been delivered too."""
        self._update(phase="done", run_dir=str(self._run_path), message=None, lasting=None)

    def _model(self, path: Path, name: str, row: EpochRow) -> None:
        if self._kind(path) is not None and path.is_file():
            relative = path.relative_to(self._run_path).as_posix()
            self._event("model", path=relative, name=name, step=row.epoch, values=row.values())

    def _kind(self, path: Path) -> str | None:
        """Return the kind of artifact of a file in the run directory; None if this run does not send the file."""
        name = path.relative_to(self._run_path)
        for pattern, kind in self._artifacts.items():
            if len(name.parts) == len(Path(pattern).parts) and name.match(pattern):
                return kind
        return None

    def _hook_logs(self, path: Path) -> None:
        if self._events is not None:
            self._events.announce_file(real_path(self._run_path), path, "artifact", run=self.label.uuid)

    def _numbers(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Return only the metrics that are numbers: a hook may have added values of other types."""
        numbers = {name: value for name, value in metrics.items() if isinstance(value, Real)}
        if len(numbers) < len(metrics):
            others = ", ".join(sorted(str(name) for name in metrics.keys() - numbers.keys()))
            logger.warning(
                f"warning: a hook gave metrics that are no numbers, which are not logged: {others}"
            )
        return {str(name): float(value) for name, value in numbers.items()}

    def _event(self, kind: str, **fields: Any) -> None:
        if self._events is not None:
            self._events.append(kind, run=self.label.uuid, **fields)

    def _update(self, **fields: Any) -> None:
        if self._status is not None:
            self._status.update(**fields)

    def _time_left(self, epochs_left: int, this_epoch: float, elapsed: float) -> float | None:
        """Return the seconds left: the rest of this epoch, plus the mean duration of an epoch for each later epoch.

        None before this process has begun its second epoch. The mean leaves out the first epoch of this process,
        because the first epoch also loads, compiles and fills caches.
        """
        if not self._epoch_seconds or (len(self._epoch_seconds) == 1 and this_epoch == elapsed):
            return None
        recent = self._epoch_seconds[1:][-10:] or [this_epoch]
        return max(this_epoch - elapsed, 0.0) + epochs_left * sum(recent) / len(recent)


def _words_of(losses: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in losses.items())


def _words_for(left: float | None) -> str:
    return "" if left is None else f"  left {format_duration(left)}"


def _rounded(left: float | None) -> int | None:
    return None if left is None else round(left)
