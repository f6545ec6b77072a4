"""Look at runs, and send what a tracker missed.

python -m app.track ui            MLflow's page on this runs folder, at http://127.0.0.1:5000
python -m app.track stop          end that server, and no other
python -m app.track sync DIR      send what is left of all event logs under DIR
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from app.errors import StarlingError, UsageError
from app.outputs.run_dir import runs_root
from app.tracking.delivery import Bridge, bridge_lock
from app.tracking.lock import exclusive
from app.tracking.mlflow_tracker import MlflowTracker
from app.tracking.tracker import Tracker, TrackerUnavailableError

LOG_NAME = "events.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncResult:
    """What `sync` did with one log."""

    log: str
    sent: int
    """Events sent now."""
    left_out: int
    """Events that the tracker refuses, ever since the log began."""
    problem: str
    """Why it is not all sent; empty when it is."""


def sync(directory: Path, tracker: Tracker, *, from_start: bool = False) -> list[SyncResult]:
    """Send what is left of all event logs under `directory`, oldest first.

    `from_start` sends all events again; what the tracker has is not doubled. After a log that cannot be sent
    the next one is tried. Raises UsageError if there is no log.
    """
    logs = sorted(_event_logs(directory), key=lambda log: log.stat().st_mtime)
    if not logs:
        raise UsageError(f"{directory}: holds no {LOG_NAME}; name a run directory or a folder of them")
    return [_sync_one(log, tracker, from_start) for log in logs]


def _sync_one(log: Path, tracker: Tracker, from_start: bool) -> SyncResult:
    sent, left_out, problem = 0, 0, ""
    try:
        with exclusive(bridge_lock(log, tracker.name), timeout_s=0):
            bridge = Bridge(log, tracker, from_start=from_start)
            before = bridge.cursor.sent
            try:
                bridge.deliver()
            except TrackerUnavailableError as error:
                problem = str(error)
            bridge.hold_up(problem)
            sent, left_out = bridge.cursor.sent - before, bridge.cursor.rejected
    except TimeoutError:
        problem = "a bridge is at work on it"
    except OSError as error:
        problem = str(error)
    return SyncResult(log=str(log), sent=sent, left_out=left_out, problem=problem)


def _event_logs(directory: Path) -> Iterator[Path]:
    """Yield the logs below `directory`, without following links to other folders."""
    for folder, _, files in os.walk(directory):
        if LOG_NAME in files:
            yield Path(folder) / LOG_NAME


def _run_ui(options: argparse.Namespace) -> int:
    from app.tracking import ui_server

    server, was_running = ui_server.start(
        options.runs, host=options.host, port=options.port, allowed_hosts=options.allowed_hosts
    )
    if options.json:
        print(json.dumps({**asdict(server), "was_running": was_running}))
    else:
        print(
            f"MLflow {'is already' if was_running else 'is'} at {server.url}  (end it: python -m app.track stop)"
        )
    return 0


def _run_stop(options: argparse.Namespace) -> int:
    from app.tracking import ui_server

    server = ui_server.stop(options.runs)
    if options.json:
        print(json.dumps({"stopped": asdict(server) if server else None}))
    else:
        print(f"stopped {server.url}" if server else "no server of this runs folder is running")
    return 0


def _run_sync(options: argparse.Namespace) -> int:
    tracker = MlflowTracker(options.runs, os.environ)
    results = sync(options.directory, tracker, from_start=options.from_start)
    tracker.close()
    if options.json:
        print(json.dumps([asdict(result) for result in results]))
    else:
        for result in results:
            left_out = f", {result.left_out} left out" if result.left_out else ""
            held_up = f"; the rest is kept: {result.problem}" if result.problem else ""
            print(f"{result.log}: {result.sent} events sent{left_out}{held_up}")
    return 1 if any(result.problem for result in results) else 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m app.track`."""
    parser = argparse.ArgumentParser(
        prog="python -m app.track", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--runs", type=Path, default=runs_root(), help="the runs folder (default: %(default)s)"
    )
    common.add_argument("--json", action="store_true", help="print JSON")
    commands = parser.add_subparsers(required=True, metavar="ui | stop | sync")
    ui = commands.add_parser("ui", parents=[common], help="start MLflow's page in the background")
    ui.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    ui.add_argument("--port", type=int, default=5000)
    ui.add_argument(
        "--allowed-hosts", help="Host headers to answer, comma-separated (default: this machine's)"
    )
    ui.set_defaults(run=_run_ui)
    stop = commands.add_parser("stop", parents=[common], help="end the server that ui started")
    stop.set_defaults(run=_run_stop)
    send = commands.add_parser("sync", parents=[common], help="send what is left of event logs")
    send.add_argument("directory", type=Path, metavar="DIR", help="a run directory, or a folder of them")
    send.add_argument(
        "--from-start", action="store_true", help="send everything again, to a database that lost it"
    )
    send.set_defaults(run=_run_sync)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one of the commands; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except StarlingError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
