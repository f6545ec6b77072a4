"""The bridge: a process beside the trainer that follows an event log and feeds a tracker.

    python -m app.tracking.bridge RUN_DIR/events.jsonl --follow --parent PID

It may hang, die, or be killed and started again: the cursor says how far it came, and what it sends twice
the tracker takes once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.errors import StarlingError
from app.outputs.run_dir import runs_root
from app.tracking.cursor import Cursor, RunProgress, cursor_path
from app.tracking.events import Event, last_event, metric_values, read_events
from app.tracking.lock import exclusive
from app.tracking.process_identity import ProcessIdentity
from app.tracking.tracker import Run, Tracker, TrackerRejectedError, TrackerUnavailableError

POLL_S = 0.5
BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
LAST_ATTEMPTS = 3
"""Attempts after the trainer is done; the rest waits for `python -m app.track sync`."""
LAST_ATTEMPTS_S = 5.0
"""No further attempt is begun this long after the trainer is done."""
_EVENTS_BETWEEN_SAVES = 50


class Bridge:
    """Deliver one log to one tracker, from the saved cursor on."""

    def __init__(self, log: Path, tracker: Tracker, *, from_start: bool = False) -> None:
        self.log = log
        self._tracker = tracker
        destination = tracker.destination(log.parent)
        self.cursor = (
            Cursor(destination=destination) if from_start else Cursor.load(log, tracker.name, destination)
        )
        self._handlers: dict[str, Callable[[Event], bool]] = {
            "run_start": self._start_run,
            "metrics": self._log_metrics,
            "artifact": self._log_artifact,
            "run_end": self._end_run,
        }

    @property
    def pending(self) -> int:
        """The number of bytes of the log that are not delivered."""
        return (self.log.stat().st_size if self.log.exists() else 0) - self.cursor.offset

    def deliver(self, stop: Callable[[], bool] = lambda: False) -> int:
        """Deliver what the log holds beyond the cursor, and return the number of events.

        Raises TrackerUnavailableError with the cursor before the event that could not be sent, and OSError when
        the cursor cannot be saved.
        """
        count = 0
        while not stop():
            events, end = read_events(self.log, self.cursor.offset)
            if end == self.cursor.offset:
                break
            count += self._deliver_batch(events[:_EVENTS_BETWEEN_SAVES], stop)
            if len(events) <= _EVENTS_BETWEEN_SAVES and self.cursor.offset != end and not stop():
                # What stands behind the last event is none: torn lines, or another version's.
                self.cursor.offset = end
                self._save()
        return count

    def hold_up(self, problem: str) -> None:
        """Note in the cursor file, for the trainer to read, why delivery does not go on."""
        if problem != self.cursor.problem:
            self.cursor.problem = problem
            self._save()

    def _deliver_batch(self, events: list[Event], stop: Callable[[], bool]) -> int:
        count = 0
        try:
            for event in events:
                if stop():
                    break
                self._deliver_one(event)
                self.cursor.offset = event.end
                count += 1
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
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            self._leave_out(event, f"not a valid event: {error!r}")

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
            parent_uuid=parent.get("uuid"),
            parent_name=str(parent.get("name", "")),
            params=dict(fields["params"]),
            tags=dict(fields["tags"]),
        )
        run_id = self._tracker.start_run(run)
        known = self.cursor.runs.get(event.run)
        steps = known.steps if known else {}
        self.cursor.runs[event.run] = RunProgress(run_id=run_id, directory=str(fields["dir"]), steps=steps)
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
        directory = (self.log.parent / run.directory).resolve()
        path = (directory / str(event.fields["path"])).resolve()
        if not path.is_relative_to(directory):
            raise TrackerRejectedError(f"{event.fields['path']} leaves the run directory {directory}")
        if not path.is_file():
            raise TrackerRejectedError(f"{path} does not exist")
        folder = path.parent.relative_to(directory).as_posix()
        self._tracker.log_artifact(run.run_id, path, "" if folder == "." else folder)
        return True

    def _end_run(self, event: Event) -> bool:
        run, fields = self._run_of(event), event.fields
        self._tracker.end_run(run.run_id, str(fields["status"]), str(fields["reason"]), time=event.time)
        return True

    def _run_of(self, event: Event) -> RunProgress:
        try:
            return self.cursor.runs[event.run]
        except KeyError:
            raise TrackerRejectedError(f"its run {event.run} was never started in this log") from None

    def _save(self) -> None:
        self.cursor.save(self.log, self._tracker.name)


def follow(
    bridge: Bridge,
    *,
    trainer_is_gone: Callable[[], bool] = lambda: False,
    opened_at: int = 0,
    stop: threading.Event | None = None,
    poll_s: float = POLL_S,
    backoff_s: tuple[float, ...] = BACKOFF_S,
) -> int:
    """Deliver events as they come until the log ends, or its trainer is gone; return the exit status.

    0: everything is delivered. 1: the rest is kept for `sync`. A tracker that is out of order is tried again
    with growing pauses while the trainer lives, then `LAST_ATTEMPTS` times. `stop` ends it after the event at
    hand. A `log_end` before byte `opened_at` is an earlier session's.
    """
    stop = stop or threading.Event()
    failures = last_failures = 0
    done_since: float | None = None

    def done() -> bool:
        return _log_is_closed(bridge.log, opened_at) or trainer_is_gone()

    while not stop.is_set():
        was_done = done()
        if was_done and done_since is None:
            done_since = time.monotonic()
        try:
            bridge.deliver(stop.is_set)
            bridge.hold_up("")
        except (TrackerUnavailableError, OSError) as error:
            failures += 1
            if failures == 1:
                print(f"{bridge.log}: {error}; kept, and tried again", file=sys.stderr, flush=True)
            _hold_up(bridge, str(error))
            if was_done and done_since is not None:
                last_failures += 1
                if last_failures >= LAST_ATTEMPTS or time.monotonic() - done_since > LAST_ATTEMPTS_S:
                    return 1
            pause = backoff_s[min(failures, len(backoff_s)) - 1]
            _pause(1.0 if was_done else pause, stop, lambda: not was_done and done(), poll_s)  # noqa: B023
            continue
        failures = 0
        if was_done and done():
            return 0
        done_since, last_failures = None, 0
        stop.wait(poll_s)
    return 1 if bridge.pending else 0


def _hold_up(bridge: Bridge, problem: str) -> None:
    try:
        bridge.hold_up(problem)
    except OSError as error:
        print(f"{bridge.log}: cannot save the cursor: {error}", file=sys.stderr, flush=True)


def _pause(seconds: float, stop: threading.Event, wake: Callable[[], bool], poll_s: float) -> None:
    """Wait for `seconds`, or until `stop` is set or `wake` says so."""
    deadline = time.monotonic() + seconds
    while not stop.wait(min(poll_s, max(0.0, deadline - time.monotonic()))):
        if time.monotonic() >= deadline or wake():
            return


def _log_is_closed(log: Path, opened_at: int) -> bool:
    """Return whether the log's last event is a `log_end` written after byte `opened_at`."""
    event = last_event(log)
    return event is not None and event.name == "log_end" and event.end > opened_at


def bridge_lock(log: Path, tracker: str) -> Path:
    """Return the lock file that makes sure that one process at a time delivers `log`."""
    return cursor_path(log, tracker).with_suffix(".lock")


def main(arguments: list[str] | None = None) -> int:
    """Run the bridge for one log; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m app.tracking.bridge", description=__doc__)
    parser.add_argument("log", type=Path, help="the event log")
    parser.add_argument(
        "--follow", action="store_true", help="go on until the log ends or the trainer is gone"
    )
    parser.add_argument("--parent", type=ProcessIdentity.parse, help="the trainer, as PID:START")
    parser.add_argument("--opened-at", type=int, default=0, help="the log's size when the trainer opened it")
    options = parser.parse_args(arguments)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    # The terminal's Ctrl-C is the trainer's to handle; the bridge goes on until the log ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(10)
    trainer: ProcessIdentity | None = options.parent

    def trainer_is_gone() -> bool:
        return not options.follow or (trainer is not None and not trainer.is_alive())

    from app.tracking.mlflow_tracker import MlflowTracker

    try:
        tracker = MlflowTracker(runs_root(), os.environ)
        # A predecessor may still be sending the end of the run that is being resumed.
        with exclusive(bridge_lock(options.log, tracker.name), timeout_s=120):
            bridge = Bridge(options.log, tracker)
            status = follow(bridge, trainer_is_gone=trainer_is_gone, opened_at=options.opened_at, stop=stop)
        tracker.close()
    except (StarlingError, TimeoutError) as error:
        print(f"{options.log}: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    return status


if __name__ == "__main__":
    sys.exit(main())
