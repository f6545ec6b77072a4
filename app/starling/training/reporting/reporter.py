"""Tell the world how a run goes: lines for people, a status file for the launcher, events for the trackers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from starling.core.instants import format_duration
from starling.core.paths import real_path
from starling.core.worker_status import WorkerStatus
from starling.outputs.run_dir import RunDir
from starling.progress import Progress
from starling.tracking.events import RUN_ARTIFACTS, EventLog, tells_metrics
from starling.training.reporting.hooks import Hook, Hooks, Training
from starling.training.reporting.results import EpochRow

STATUS_EVERY_S = 2.0
BEST_EVERY_S = 300.0
"""Seconds between two sendings of a best.pt that gets better each epoch; the last one is sent in any case."""
_PHASES = {"failed": "failed", "killed": "stopped", "pruned": "done"}
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
        self._hooks = Hooks(hooks or {}, self.say)
        self._best_sent_at = -BEST_EVERY_S
        self._clock = clock
        self._status_at = -STATUS_EVERY_S
        self._epoch_started = clock()
        self._epoch_seconds: list[float] = []
        self._trained_s = 0.0
        """Seconds into this epoch when its last iteration so far ended."""
        self._beyond = 0.0
        """Seconds that the last epoch took beyond its iterations: validation and saves."""

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.progress.say(line)

    def hook(self, name: str, **changes: Any) -> None:
        """Call the user's hooks of this name; see `starling.training.reporting.hooks`."""
        self._hooks.fire(name, **changes)

    def offer_hooks(self, training: Training) -> None:
        """Let hooks see this training from here on, and send artifacts and say lines through this reporter."""
        training.log, training.say = self._hook_logs, self.say
        self._hooks.training = training

    def started(
        self, params: dict[str, Any], tags: dict[str, str], datasets: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Tell that the run begins or goes on, and what data it reads."""
        self._event("run_start", project=self.label.project, name=self.label.name, parent=self.label.parent,
                    params=params, tags=tags, dir=self._run_path)  # fmt: skip
        for dataset in datasets:
            self._event("dataset", **dataset)
        if self._events is not None:
            self.progress.listen(lambda line: self._event("message", text=line))
        self._update(phase="starting", run_dir=str(self._run_path), message=None, lasting=None)

    def goes_on_after(self, row: EpochRow) -> None:
        """Tell the figures of the last epoch before a resume, where a kill came before they were told."""
        if self._events is not None and not tells_metrics(self._events.path, self.label.uuid, row.epoch):
            self._event("metrics", step=row.epoch, values=row.values())

    def epoch_began(self) -> None:
        """Start the epoch's clock."""
        self._epoch_started = self._clock()

    def appeared(self, *paths: Path) -> None:
        """Send files as they appear, those that a run of this kind sends at all."""
        for path in paths:
            kind = self._kind(path)
            if kind is not None and self._events is not None and path.is_file():
                self._events.announce_file(self._run_path, path, kind, run=self.label.uuid)

    def image(self, path: Path, name: str, epoch: int) -> None:
        """Show an image as one of a series by epoch."""
        self._event("picture", path=path.relative_to(self._run_path).as_posix(), name=name, step=epoch)

    def saved(self, row: EpochRow, kept: Path | None, best: Path | None) -> None:
        """Tell of weights that an epoch left: those of `--save-period`, and the best so far."""
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
        """Tell the figures of a finished epoch."""
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
        self.say(
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
        """Tell why the run is over (finished, failed, killed or pruned), which files it leaves, and its model.

        `best` is the row whose weights are the model; None: there is none to offer. `lasting` says of a failure that
        it would come again.
        """
        self.hook("teardown")
        if self._events is not None:
            self._events.announce(self._run_path, self._artifacts, run=self.label.uuid)
        if best is not None:
            self._model(RunDir(self._run_path).best, "best", best)
        self._event("run_end", status=status, reason=reason)
        self.progress.listen(None)
        # A candidate's end is not its worker's; a finished run is done when its results have been delivered.
        if self.label.parent is None and status != "finished":
            self._update(phase=_PHASES[status], message=reason or None, lasting=lasting or None)

    def done(self) -> None:
        """Tell that nothing is left to do of a finished run."""
        self._update(phase="done", run_dir=str(self._run_path), message=None, lasting=None)

    def _model(self, path: Path, name: str, row: EpochRow) -> None:
        if self._kind(path) is not None and path.is_file():
            relative = path.relative_to(self._run_path).as_posix()
            self._event("model", path=relative, name=name, step=row.epoch, values=row.values())

    def _kind(self, path: Path) -> str | None:
        """Return what kind of artifact a file of the run directory is; None: a run of this kind does not send it."""
        name = path.relative_to(self._run_path)
        for pattern, kind in self._artifacts.items():
            if len(name.parts) == len(Path(pattern).parts) and name.match(pattern):
                return kind
        return None

    def _hook_logs(self, path: Path) -> None:
        if self._events is not None:
            self._events.announce_file(real_path(self._run_path), path, "artifact", run=self.label.uuid)

    def _numbers(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Return the metrics that are numbers; a hook may have added what is none."""
        numbers = {name: value for name, value in metrics.items() if isinstance(value, Real)}
        if len(numbers) < len(metrics):
            others = ", ".join(sorted(str(name) for name in metrics.keys() - numbers.keys()))
            self.say(f"warning: a hook gave metrics that are no numbers, which are not logged: {others}")
        return {str(name): float(value) for name, value in numbers.items()}

    def _event(self, kind: str, **fields: Any) -> None:
        if self._events is not None:
            self._events.append(kind, run=self.label.uuid, **fields)

    def _update(self, **fields: Any) -> None:
        if self._status is not None:
            self._status.update(**fields)

    def _time_left(self, epochs_left: int, this_epoch: float, elapsed: float) -> float | None:
        """Return the seconds left: the rest of this epoch, and the mean epoch for each to come.

        None before this process has begun its second epoch. The first one also loads, compiles and fills caches, so it
        counts in no mean.
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
