"""The conditions of `bench/tracking.py`: runs with trackers that are off, healthy, slow or dead, frozen on demand."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import psutil
from common import REPOSITORY

from starling.outputs.run_dir import RunDir
from starling.progress import Silence, on_console
from starling.tracking.cursor import cursor_path
from starling.tracking.events import EventLog
from starling.tracking.process import start_bridges
from starling.training.reporting.reporter import Reporter, RunLabel
from starling.training.reporting.results import EpochRow, write_results

OFF = ("off", "off again")
"""The conditions without tracking."""
SETTLE_S = 120
"""Maximum seconds of waiting for a bridge."""
SLOW_S = 30
SLOW_SERVER = f"""
import contextlib, http.server, time
class Slow(http.server.BaseHTTPRequestHandler):
    def answer(self):
        time.sleep({SLOW_S})
        with contextlib.suppress(OSError):
            self.send_error(503)
    do_GET = do_POST = do_PATCH = do_PUT = answer
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
print(server.server_port, flush=True)
server.serve_forever()
"""


class Condition:
    """One run with its event log and bridges, which are frozen while it is not the run's turn."""

    def __init__(
        self, name: str, folder: Path, variables: Mapping[str, str], servers: Sequence[psutil.Process] = ()
    ) -> None:
        """Start the bridges that `variables` configure (empty: no tracking); `servers` are frozen with the bridges."""
        self.name = name
        self.run = RunDir(folder / name)
        self.run.path.mkdir(parents=True)
        self.rows: list[EpochRow] = []
        log = EventLog(self.run.events, name) if variables else None
        self._reporter = Reporter(
            RunLabel(name, "bench", name), self.run.path, progress=Silence(), events=log
        )
        self._reporter.started({"epochs": 100}, {})
        # A separate runs folder, because a frozen bridge would hold its locks there against other bridges.
        with mock.patch.dict(os.environ, variables, STARLING_RUNS=str(self.run.path)):
            began = time.perf_counter()
            self._bridges = start_bridges(log) if log else None
            self.starting_s = time.perf_counter() - began
        handles = self._bridges.handles if self._bridges else ()
        self._processes = {handle.tracker: psutil.Process(handle.process.pid) for handle in handles}
        self._servers = servers

    @property
    def is_tracked(self) -> bool:
        """Whether the condition has bridges."""
        return bool(self._processes)

    def epoch_ended(self) -> None:
        """Do what the trainer does at the end of an epoch."""
        n = len(self.rows)
        self.rows.append(
            EpochRow(n, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6, 0.7), (0.1, 0.2, 0.3), (0.1, 0.01, 0.01))
        )
        write_results(self.run.results_csv, self.rows)
        with on_console(self._reporter.progress):  # the line goes into the log, as in a command
            self._reporter.epoch_ended(self.rows[-1], 100, 8, best=False)
        if self._bridges is not None:
            self._bridges.check()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Let the bridges run inside the block."""
        self.signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.signal(signal.SIGSTOP)

    def signal(self, signum: int) -> None:
        """Send a signal to the bridges, and to the servers that are frozen with them."""
        for process in (*self._servers, *self._processes.values()):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signum)

    def kill(self) -> None:
        """End the bridges, so that they write nothing more."""
        self.signal(signal.SIGKILL)
        psutil.wait_procs(self._processes.values(), timeout=5)

    def processor_s(self) -> dict[str, float]:
        """Return the processor seconds of each bridge so far."""
        return {name: sum(process.cpu_times()[:2]) for name, process in self._processes.items()}

    def settle(self) -> None:
        """Wait until each bridge has sent everything, or, except in `healthy`, has found its server unreachable."""
        deadline = time.monotonic() + SETTLE_S
        with self.turn():
            while not all(self._has_settled(tracker) for tracker in self._processes):
                if time.monotonic() > deadline:
                    said = "\n".join(path.read_text() for path in self.run.path.glob("bridge*.log"))
                    raise SystemExit(f"{self.name}: not everything is sent after {SETTLE_S} s\n{said}")
                time.sleep(0.2)

    def _has_settled(self, tracker: str) -> bool:
        try:
            cursor = json.loads(cursor_path(self.run.events, tracker).read_bytes())
        except (OSError, ValueError):
            return False
        if cursor["problem"]:
            return self.name != "healthy"
        return bool(cursor["offset"] == self.run.events.stat().st_size)


@contextmanager
def opened_conditions(folder: Path) -> Iterator[list[Condition]]:
    """Yield all conditions, settled and frozen; their bridges and servers are killed at the end."""
    with (
        _server("-m", "tests.doubles.clearml_server", str(folder / "clearml")) as double,
        _server("-c", SLOW_SERVER) as slow,
        socket.socket() as dead,
    ):
        dead.bind(("127.0.0.1", 0))  # bound, but never listens
        healthy = dict(_line_of(double).removeprefix("export ").split("=", 1) for _ in range(5))
        slow_port, dead_port = int(_line_of(slow)), int(dead.getsockname()[1])
        conditions: list[Condition] = []
        try:
            for name in OFF:
                conditions.append(Condition(name, folder, {}))
            conditions.append(Condition("healthy", folder, healthy, [double]))
            # Each settles alone, because the imports of its libraries must not be measured.
            conditions[-1].settle()
            for name, port in (("slow", slow_port), ("dead", dead_port)):
                hosts = ("MLFLOW_TRACKING_URI", "CLEARML_API_HOST", "CLEARML_FILES_HOST")
                away = dict.fromkeys(hosts, f"http://127.0.0.1:{port}")
                conditions.append(Condition(name, folder, {**healthy, **away}))
                conditions[-1].settle()
            yield conditions
        finally:
            for condition in conditions:
                condition.kill()


@contextmanager
def _server(*arguments: str) -> Iterator[psutil.Popen]:
    command = [sys.executable, *arguments]
    server = psutil.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    try:
        yield server
    finally:
        server.kill()
        server.wait()


def _line_of(server: psutil.Popen) -> str:
    return str(server.stdout.readline()).strip()
