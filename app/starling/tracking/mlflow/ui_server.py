"""MLflow's page for the embedded database: one server in the background, which a record file identifies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

from starling.core.errors import StarlingError, UsageError
from starling.core.files.atomic import write_atomic
from starling.core.files.safe_open import open_file, read_file, remove
from starling.core.plain_json import parse_json
from starling.tracking.mlflow.client import CLIENT_LIMITS
from starling.tracking.mlflow.database import database_uri, held_database
from starling.tracking.mlflow.tracker import MlflowTracker
from starling.tracking.process_identity import ProcessIdentity

START_S = 90.0
STOP_S = 10.0


class UiServerError(StarlingError):
    """The MLflow server did not start or does not stop."""

    exit_code = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class UiServer:
    """A server that `start` has started, as its record file describes it."""

    pid: int
    start: str
    host: str
    """The machine or container that the server runs on."""
    url: str

    @property
    def process(self) -> ProcessIdentity:
        """The server's process, the leader of its process group."""
        return ProcessIdentity(self.pid, self.start)

    @property
    def is_here(self) -> bool:
        """Whether the server was started on this machine, so that its process id is valid here."""
        return self.host == socket.gethostname()


def start(runs: Path, *, host: str, port: int, allowed_hosts: str | None = None) -> tuple[UiServer, bool]:
    """Start the server and wait until it answers; return it, and whether it was already running.

    Raises UsageError if the port is taken, UiServerError if the server ends or does not answer in time.
    """
    if (running := find(runs)) is not None:
        return running, True
    _check_port(host, port)
    MlflowTracker(
        runs, {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    ).create_database()
    process = _spawn(runs, host, port, allowed_hosts or f"localhost:*,127.0.0.1:*,{host}:*")
    shown = "127.0.0.1" if host in {"0.0.0.0", "::"} else host
    url = f"http://{shown}:{port}"
    identity = ProcessIdentity.of(process.pid)
    server = UiServer(pid=identity.pid, start=identity.start, host=socket.gethostname(), url=url)
    write_atomic(_record(runs), json.dumps(asdict(server)))
    deadline = time.monotonic() + START_S
    while not _is_healthy(url):
        if process.poll() is not None or time.monotonic() > deadline:
            stop(runs)
            raise UiServerError(f"the MLflow server did not start at {url}; see {_log(runs)}")
        time.sleep(0.3)
    return server, False


def stop(runs: Path) -> UiServer | None:
    """End the server that `start` has started, and no other; return it, or None if there is none.

    Raises UiServerError if the server was started on another machine.
    """
    server = _read(runs)
    if server is None:
        return None
    if not server.is_here:
        raise UiServerError(
            f"the server at {server.url} was started on {server.host}; run `starling track stop` there"
        )
    was_alive = server.process.is_alive()
    if was_alive:
        _end_group(server.process)
    remove(_record(runs))
    return server if was_alive else None


def find(runs: Path) -> UiServer | None:
    """Return the running server of this runs folder, or None."""
    server = _read(runs)
    if server is None:
        return None
    return server if (server.process.is_alive() if server.is_here else _is_healthy(server.url)) else None


def _spawn(runs: Path, host: str, port: int, allowed_hosts: str) -> subprocess.Popen[bytes]:
    folder = runs.absolute() / "mlflow"
    command = [sys.executable, "-P", "-m", "mlflow", "server", "--workers", "1"]
    command += ["--backend-store-uri", database_uri(runs)]
    command += [
        "--artifacts-destination",
        str(folder / "artifacts"),
        "--default-artifact-root",
        "mlflow-artifacts:/",
    ]
    command += ["--host", host, "--port", str(port), "--allowed-hosts", allowed_hosts]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment["MLFLOW_DISABLE_TELEMETRY"] = CLIENT_LIMITS["MLFLOW_DISABLE_TELEMETRY"]
    environment.pop("MLFLOW_TRACKING_URI", None)
    held_database(runs)  # raises if its folder is unsafe
    log = open_file(_log(runs), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, alone=True)
    with open(log, "wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"{host}:{port} is not free ({reason}); take another with --port {port + 1}"
            ) from None


def _is_healthy(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url}/health", timeout=3) as answer:
            return answer.status == 200
    except (OSError, ValueError):
        return False


def _end_group(process: ProcessIdentity) -> None:
    """End the server and its workers, which form its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        while process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.1)
        # A worker that outlives its server would keep the port.
        os.killpg(process.pid, signal.SIGKILL)


def _read(runs: Path) -> UiServer | None:
    try:
        return UiServer(**parse_json(read_file(_record(runs))))
    except (OSError, ValueError, TypeError):
        return None


def _record(runs: Path) -> Path:
    return runs / "mlflow" / "server.json"


def _log(runs: Path) -> Path:
    return runs / "mlflow" / "server.log"
