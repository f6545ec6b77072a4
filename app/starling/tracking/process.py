"""The trainer's control of the bridges: start them, check them once per epoch, give them time to drain at the end."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from starling.core import package
from starling.core.files.refusals import refusal
from starling.core.files.safe_open import make_folder, open_file, state_of, top_of
from starling.tracking.cursor import Cursor
from starling.tracking.events import EventLog
from starling.tracking.process_identity import ProcessIdentity
from starling.tracking.trackers import TrackerKind, wanted_trackers

logger = logging.getLogger(__name__)

RESTARTS = 3
DRAIN_S, STOPPED_DRAIN_S = 20.0, 5.0
"""Maximum seconds of waiting for trackers at the end of a training, and at the end of a training that was stopped."""
BUSY_S = 300.0


class BridgeHandle:
    """A running bridge to one tracker. Only `finish` waits for the bridge, for a bounded time."""

    def __init__(self, log: EventLog, command: list[str], tracker: str = "mlflow") -> None:
        self.tracker = tracker
        self._log = log
        self._command = command
        self._warned = False
        self._restarts = 0
        self.process = self._spawn()

    def check(self) -> None:
        """Restart the bridge if it was killed, and warn once if it is held up; call this method once per epoch."""
        status = self.process.poll()
        if status is not None and status < 0 and self._restarts < RESTARTS:
            self._restarts += 1
            with contextlib.suppress(OSError):
                self.process = self._spawn()
        elif problem := self._cursor().problem:
            self._warn_once(problem)

    def finish(self, timeout_s: float, *, patient: bool) -> bool:
        """Wait until the closed log is delivered, for `timeout_s` seconds at most.

        Return whether it is delivered. If not, a warning names the remedy, and a bridge that is still at work
        continues. With `patient`, a bridge that is registering a model, which may be large, gets `BUSY_S` more seconds.
        """
        status = self._wait(timeout_s)
        if status is None and patient and self._cursor().busy:
            status = self._wait(BUSY_S)
        if status != 0:
            self._warn_once(self._cursor().problem or f"see {self._output}")
        return status == 0

    def _wait(self, timeout_s: float) -> int | None:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    @property
    def _output(self) -> Path:
        """The file with the bridge's output: `bridge.log` for MLflow, `bridge.NAME.log` for other trackers."""
        name = "bridge.log" if self.tracker == "mlflow" else f"bridge.{self.tracker}.log"
        return self._log.path.with_name(name)

    def _spawn(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": package.python_path(), "OMP_NUM_THREADS": "1"}
        output_file = open_file(self._output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, alone=True)
        with open(output_file, "ab") as output:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                # A separate session: a signal to the trainer's process group must not end the drain.
                start_new_session=True,
            )

    def _cursor(self) -> Cursor:
        """Return the content of the bridge's cursor file; an empty cursor for a missing or damaged file."""
        return Cursor.look(self._log.path, self.tracker)

    def _warn_once(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            remedy = f"starling track sync {self._log.path.parent}"
            logger.warning(
                f"tracking: not everything is sent to {self.tracker} ({problem}); nothing is lost, send it later with: {remedy}"
            )


class Bridges:
    """The bridges of one log, one for each enabled tracker; there may be none."""

    def __init__(self, log: EventLog, handles: Sequence[BridgeHandle]) -> None:
        self._log = log
        self.handles = tuple(handles)

    def check(self) -> None:
        """Check each bridge; call this method once per epoch."""
        for handle in self.handles:
            handle.check()

    def finish(self, timeout_s: float = DRAIN_S) -> bool:
        """Close the log and give all bridges together `timeout_s` seconds; return whether all have delivered it."""
        self.check()
        self._log.append("log_end")
        deadline = time.monotonic() + timeout_s
        delivered = [
            handle.finish(max(0.0, deadline - time.monotonic()), patient=timeout_s >= DRAIN_S)
            for handle in self.handles
        ]
        return all(delivered)


def start_bridges(log: EventLog) -> Bridges:
    """Start a bridge for `log` to each tracker that is on, and return at once.

    `starling settings mlflow=False` disables a tracker. A bridge that cannot be started costs a warning and never stops
    the training. Raises ConfigError for a damaged settings file.
    """
    started = [start_bridge(log, kind) for kind in wanted_trackers()]
    return Bridges(log, [handle for handle in started if handle is not None])


def start_bridge(
    log: EventLog, kind: TrackerKind, *, command: list[str] | None = None
) -> BridgeHandle | None:
    """Start the bridge to one tracker; print a warning and return None if it cannot be started.

    `command` replaces the bridge's command line.
    """
    if command is None and not kind.is_installed:
        logger.warning(
            f"tracking: {kind.package} is not installed, so events stay in the log; install requirements.txt to send them"
        )
        return None
    trainer = ProcessIdentity.of(os.getpid())
    default = [sys.executable, "-P", "-m", "starling.tracking.bridge", str(log.path.absolute())]
    default += ["--tracker", kind.name, "--parent", str(trainer), "--top", str(top_of(log.path)[0])]
    try:
        make_folder(log.path.parent)
        # The log of a resumed run ends with the `log_end` of the session before.
        state = state_of(log.path)
        size = 0 if state is None else state.st_size
        return BridgeHandle(log, command or [*default, "--opened-at", str(size)], kind.name)
    except OSError as error:
        reason = refusal(error) or error
        logger.warning(f"tracking: the bridge cannot be started ({reason}); events stay in {log.path}")
        return None
