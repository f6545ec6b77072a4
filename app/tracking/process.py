"""The trainer's side of the bridge: start it, look at it once an epoch, give it time to drain at the end."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from app import settings
from app.tracking.cursor import cursor_path
from app.tracking.events import EventLog
from app.tracking.process_identity import ProcessIdentity

TRACKER = "mlflow"
RESTARTS = 3
_PACKAGE_PARENT = Path(__file__).resolve().parents[2]


def _print_warning(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class BridgeHandle:
    """A running bridge. Nothing here waits for a tracker, except `finish`, whose time is bounded."""

    def __init__(self, log: EventLog, command: list[str], warn: Callable[[str], None]) -> None:
        self._log = log
        self._command = command
        self._warn = warn
        self._warned = False
        self._restarts = 0
        self.process = self._spawn()

    def check(self) -> None:
        """Start the bridge again if it was killed, and warn once if it is held up; call it once an epoch."""
        status = self.process.poll()
        if status is not None and status < 0 and self._restarts < RESTARTS:
            self._restarts += 1
            with contextlib.suppress(OSError):
                self.process = self._spawn()
        elif problem := self._problem():
            self._warn_once(problem)

    def finish(self, timeout_s: float = 20.0) -> bool:
        """Close the log and wait until it is delivered, for `timeout_s` seconds at most.

        Returns whether it is. If not, a warning names the remedy, and a bridge that still works at it is left
        to go on.
        """
        self.check()
        self._log.append("log_end")
        try:
            delivered = self.process.wait(timeout_s) == 0
        except subprocess.TimeoutExpired:
            delivered = False
        if not delivered:
            self._warn_once(self._problem() or f"see {self._log.path.with_name('bridge.log')}")
        return delivered

    def _spawn(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": _python_path(), "OMP_NUM_THREADS": "1"}
        with open(self._log.path.with_name("bridge.log"), "ab") as output:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                # Its own session: a signal to the trainer's group must not cut the drain short.
                start_new_session=True,
            )

    def _problem(self) -> str:
        """Return why the bridge says that it is held up, or an empty string."""
        try:
            cursor = json.loads(cursor_path(self._log.path, TRACKER).read_bytes())
            return str(cursor.get("problem", ""))
        except (OSError, ValueError, AttributeError):
            return ""

    def _warn_once(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            remedy = f"python -m app.track sync {self._log.path.parent}"
            self._warn(
                f"tracking: not everything is sent ({problem}); nothing is lost, send it later with: {remedy}"
            )


def start_bridge(
    log: EventLog,
    *,
    warn: Callable[[str], None] = _print_warning,
    command: list[str] | None = None,
) -> BridgeHandle | None:
    """Start the bridge for `log` and return its handle at once; None if tracking is off or not installed.

    `python -m app.settings mlflow=False` turns it off. A bridge that cannot be started is a warning, never a
    reason not to train. `command` replaces the bridge's command line. Raises ConfigError for a damaged settings file.
    """
    if not settings.read().mlflow:
        return None
    if command is None and importlib.util.find_spec("mlflow") is None:
        warn(
            "tracking: mlflow is not installed, so events stay in the log; install requirements.txt to send them"
        )
        return None
    trainer = ProcessIdentity.of(os.getpid())
    default = [sys.executable, "-P", "-m", "app.tracking.bridge", str(log.path.absolute()), "--follow"]
    default += ["--parent", str(trainer)]
    try:
        log.path.parent.mkdir(parents=True, exist_ok=True)
        # A resumed run's log ends with the `log_end` of the session before.
        size = log.path.stat().st_size if log.path.exists() else 0
        return BridgeHandle(log, command or [*default, "--opened-at", str(size)], warn)
    except OSError as error:
        warn(f"tracking: the bridge cannot be started ({error}); events stay in {log.path}")
        return None


def _python_path() -> str:
    """Return PYTHONPATH with the folder of the `app` package first, however the trainer was started."""
    rest = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join(filter(None, [str(_PACKAGE_PARENT), rest]))
