"""Deliver an event log to a tracker: call the tracker for each event, and record the position in the log."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from starling.core.files.regular import is_file
from starling.core.words import shown
from starling.tracking.cursor import Cursor, RunProgress, cursor_path
from starling.tracking.events import Damage, Event, console_text, metric_values, read_lines
from starling.tracking.tracker import (
    DatasetInput,
    ModelFile,
    Run,
    Tracker,
    TrackerRejectedError,
)

_IMPOSSIBLE_NAMES = frozenset({errno.ENAMETOOLONG, errno.ELOOP})
"""Errors of the system for a path that no file can have; other errors may be temporary."""
SAMPLES_KEPT = 360
"""Maximum number of samples that wait for an unreachable tracker: an hour of samples."""
TRAINER_GONE = "the trainer's process ended without a word: killed, or out of memory; resume with --resume"
_LINES_BETWEEN_SAVES = 50


class Bridge:
    """Deliver one log to one tracker, beginning at the saved cursor."""

    def __init__(self, log: Path, tracker: Tracker, *, from_start: bool = False) -> None:
        self.log = log
        self._tracker = tracker
        destination = tracker.destination(log.parent)
        self.cursor = (
            Cursor(destination=destination) if from_start else Cursor.load(log, tracker.name, destination)
        )
        self.cursor.busy = ""  # left by an earlier bridge that was killed
        self._handlers: dict[str, Callable[[Event], bool]] = {
            "run_start": self._start_run,
            "metrics": self._log_metrics,
            "dataset": self._log_dataset,
            "picture": self._log_image,
            "artifact": self._log_artifact,
            "model": self._log_model,
            "message": self._log_console,
            "run_end": self._end_run,
        }
        self._named_damage = False
        self._samples: deque[tuple[str, Mapping[str, float], int, float]] = deque()

    @property
    def pending(self) -> int:
        """The number of undelivered bytes of the log."""
        return (self.log.stat().st_size if self.log.exists() else 0) - self.cursor.offset

    def deliver(self, stop: Callable[[], bool] = lambda: False) -> int:
        """Deliver the events behind the cursor, and return their number.

        Raises TrackerUnavailableError, with the cursor before the event that could not be sent, and OSError if
        the cursor cannot be saved.
        """
        count = 0
        while not stop():
            lines, end = read_lines(self.log, self.cursor.offset)
            if end == self.cursor.offset:
                break
            count += self._deliver_batch(lines[:_LINES_BETWEEN_SAVES], stop)
            if len(lines) <= _LINES_BETWEEN_SAVES and self.cursor.offset != end and not stop():
                # No event follows the last one: the rest is empty lines, or lines of another version.
                self.cursor.offset = end
                self._save()
        self._send_samples()
        self._flush()
        return count

    def add_sample(self, values: Mapping[str, float], *, time: float) -> None:
        """Keep a sample of the machine for the current run; the next delivery sends it.

        While the tracker is unreachable, the oldest samples are dropped, and counted in the cursor.
        """
        uuid = next((uuid for uuid, run in reversed(self.cursor.runs.items()) if run.is_open), None)
        if uuid is None:
            return
        if len(self._samples) == SAMPLES_KEPT:
            self._samples.popleft()
            self.cursor.dropped += 1
        run = self.cursor.runs[uuid]
        self._samples.append((run.run_id, values, max(0, round(time - run.started)), time))

    def finish(self, *, time: float, gone: bool) -> None:
        """Send postponed data. `gone`: the trainer ended without a `log_end`, so its runs are reported as killed.

        Raises TrackerUnavailableError.
        """
        self._send_samples()
        for run in self.cursor.runs.values():
            # A shared run (a search) continues while other workers live; nobody else reports the end of other runs.
            if gone and run.is_open and not run.is_shared:
                with contextlib.suppress(TrackerRejectedError):
                    self._tracker.end_run(run.run_id, "killed", TRAINER_GONE, time=time)
        self._flush(last=True)

    def hold_up(self, problem: str) -> None:
        """Record in the cursor file, for the trainer to read, why delivery is held up."""
        if problem != self.cursor.problem:
            self.cursor.problem = problem
            self._save()

    def _deliver_batch(self, lines: list[Event | Damage], stop: Callable[[], bool]) -> int:
        count = 0
        newest = {_artifact_of(line): line.seq for line in lines if _is_artifact(line)}
        try:
            for line in lines:
                if stop():
                    break
                if isinstance(line, Damage):
                    self._leave_out_line(line)
                # A file that was announced several times is sent once, for its newest event.
                elif line.seq >= newest.get(_artifact_of(line), line.seq):
                    self._deliver_one(line)
                self.cursor.offset = line.end
                count += isinstance(line, Event)
        finally:
            self._save()
        return count

    def _deliver_one(self, event: Event) -> None:
        handler = self._handlers.get(event.name)
        if handler is None:
            return
        try:
            if handler(event):
                self.cursor.sent += 1
        except TrackerRejectedError as error:
            self._leave_out(event, str(error))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            self._leave_out(event, f"not a valid event: {shown(repr(error))}")
        except OSError as error:
            if error.errno not in _IMPOSSIBLE_NAMES:
                raise
            self._leave_out(event, f"{shown(error.filename)}: {error.strerror}")

    def _leave_out_line(self, line: Damage) -> None:
        """Count a damaged line; only the first is printed, because a damaged log may hold a million such lines."""
        self.cursor.rejected += 1
        if not self._named_damage:
            self._named_damage = True
            print(
                f"{self.log}: the line that ends at byte {line.end} is damaged and left out ({line.reason}); "
                "so are others like it, without a word for each",
                file=sys.stderr,
                flush=True,
            )

    def _leave_out(self, event: Event, reason: str) -> None:
        self.cursor.rejected += 1
        print(f"{self.log}: event {event.seq} ({event.name}) left out: {reason}", file=sys.stderr, flush=True)

    def _start_run(self, event: Event) -> bool:
        fields = event.fields
        parent: dict[str, Any] = fields["parent"] or {}
        run = Run(
            uuid=event.run,
            name=str(fields["name"]),
            project=str(fields["project"]),
            time=event.time,
            directory=_real(self.log.parent / str(fields["dir"])),
            parent_uuid=parent.get("uuid"),
            parent_name=str(parent.get("name", "")),
            params=dict(fields["params"]),
            tags=dict(fields["tags"]),
        )
        run_id = self._tracker.start_run(run)
        known = self.cursor.runs.get(event.run)
        # Moved to the end of the table: samples belong to the run that began last.
        self.cursor.runs.pop(event.run, None)
        self.cursor.runs[event.run] = RunProgress(
            run_id=run_id,
            directory=str(fields["dir"]),
            is_shared=bool(fields["shared"]),
            started=known.started if known else event.time,
            steps=known.steps if known else {},
        )
        return True

    def _log_metrics(self, event: Event) -> bool:
        run, step = self._run_of(event), int(event.fields["step"])
        new = {name: value for name, value in metric_values(event).items() if step > run.steps.get(name, -1)}
        if not new:
            return False
        self._tracker.log_metrics(run.run_id, new, step=step, time=event.time)
        run.steps.update(dict.fromkeys(new, step))
        return True

    def _log_artifact(self, event: Event) -> bool:
        run = self._run_of(event)
        path, folder = self._file_of(event, run)
        self._tracker.log_artifact(run.run_id, path, folder, kind=str(event.fields["kind"]))
        return True

    def _log_dataset(self, event: Event) -> bool:
        fields = event.fields
        dataset = DatasetInput(
            role=str(fields["role"]),
            name=str(fields["name"]),
            digest=str(fields["digest"]),
            source=str(fields["source"]),
            figures={str(name): float(value) for name, value in fields["figures"].items()},
            classes=tuple(str(name) for name in fields["classes"]),
        )
        self._tracker.log_dataset(self._run_of(event).run_id, dataset)
        return True

    def _log_image(self, event: Event) -> bool:
        run, fields = self._run_of(event), event.fields
        path, _ = self._file_of(event, run)
        self._tracker.log_image(
            run.run_id, path, str(fields["name"]), step=int(fields["step"]), time=event.time
        )
        return True

    def _log_model(self, event: Event) -> bool:
        run, fields = self._run_of(event), event.fields
        path, _ = self._file_of(event, run)
        model = ModelFile(
            path=path, name=str(fields["name"]), step=int(fields["step"]), values=metric_values(event)
        )
        self.cursor.busy = f"registering {model.name}"
        self._save()
        try:
            self._tracker.log_model(run.run_id, model)
        finally:
            self.cursor.busy = ""
        return True

    def _log_console(self, event: Event) -> bool:
        def so_far() -> str:
            return console_text(self.log, event.run, event.end)

        line = str(event.fields["text"])
        self._tracker.log_console(self._run_of(event).run_id, line, so_far, time=event.time)
        return True

    def _end_run(self, event: Event) -> bool:
        run, fields = self._run_of(event), event.fields
        self._send_samples()
        self._flush(last=True)
        self._tracker.end_run(run.run_id, str(fields["status"]), str(fields["reason"]), time=event.time)
        run.is_open = False
        return True

    def _flush(self, *, last: bool = False) -> None:
        """Send postponed data. A refusal must not prevent the end of the run from being reported."""
        try:
            self._tracker.flush(last=last)
        except TrackerRejectedError as error:
            self.cursor.rejected += 1
            print(f"{self.log}: {error}", file=sys.stderr, flush=True)

    def _send_samples(self) -> None:
        while self._samples:
            run_id, values, step, time = self._samples[0]
            try:
                self._tracker.log_system(run_id, values, step=step, time=time)
            except TrackerRejectedError:
                self.cursor.dropped += 1
            self._samples.popleft()

    def _file_of(self, event: Event, run: RunProgress) -> tuple[Path, str]:
        """Return the file that an event names, and its folder below the run directory ('' is the top)."""
        directory = _real(self.log.parent / run.directory)
        path = _real(directory / str(event.fields["path"]))
        if not path.is_relative_to(directory):
            raise TrackerRejectedError(f"{shown(event.fields['path'])} leaves the run directory {directory}")
        if not is_file(path):
            raise TrackerRejectedError(f"{path} does not exist")
        folder = path.parent.relative_to(directory).as_posix()
        return path, "" if folder == "." else folder

    def _run_of(self, event: Event) -> RunProgress:
        try:
            return self.cursor.runs[event.run]
        except KeyError:
            raise TrackerRejectedError(f"its run {event.run} was never started in this log") from None

    def _save(self) -> None:
        self.cursor.save(self.log, self._tracker.name)


def _is_artifact(line: Event | Damage) -> TypeGuard[Event]:
    return isinstance(line, Event) and line.name == "artifact"


def _artifact_of(event: Event) -> tuple[str, str]:
    """Return the run and the file of an artifact event; '' in place of the file for other events."""
    return event.run, str(event.fields.get("path", "")) if event.name == "artifact" else ""


def bridge_lock(log: Path, tracker: str) -> Path:
    """Return the lock file that lets only one process at a time deliver `log`."""
    return cursor_path(log, tracker).with_suffix(".lock")


def _real(path: Path) -> Path:
    """Return the path with all links resolved; a loop of links is left unresolved."""
    return Path(os.path.realpath(path))
