"""Show runs, send events that a tracker has missed, promote a model.

starling track ui            MLflow's page for this runs folder, at http://127.0.0.1:5000
starling track stop          end that server, and no other
starling track status [DIR]  how much of the event logs under DIR is sent
starling track sync DIR      send all unsent events of the event logs under DIR
starling track export DIR    write a run as one zip
starling track promote RUN   give a run's model the alias `production`, if it passes the gate
starling track upgrade       upgrade the database of an older MLflow
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from starling.core.errors import StarlingError, UsageError
from starling.core.files.refusals import refusal
from starling.core.files.safe_open import name_top, runs_root
from starling.core.paths import real_path
from starling.core.settings.parser import PathParser
from starling.tracking.delivery import Bridge, bridge_lock
from starling.tracking.lock import exclusive
from starling.tracking.run_files import export, find_logs, pending
from starling.tracking.tracker import Tracker, TrackerUnavailableError
from starling.tracking.trackers import TRACKERS, wanted_trackers


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncResult:
    """The result of `sync` for one log."""

    log: str
    tracker: str
    sent: int
    """Number of events sent by this call."""
    left_out: int
    """Number of events that the tracker has refused since the beginning of the log."""
    problem: str
    """Why events are still unsent; empty if all are sent."""


def sync(directory: Path, tracker: Tracker, *, from_start: bool = False) -> list[SyncResult]:
    """Send the unsent events of all event logs under `directory`, oldest first.

    `from_start` sends all events again; the tracker stores no event twice. If a log cannot be sent, the next one is
    still tried. Raises UsageError if there is no log.
    """
    return [_sync_one(log, tracker, from_start) for log in find_logs(directory)]


def _sync_one(log: Path, tracker: Tracker, from_start: bool) -> SyncResult:
    sent, left_out, problem = 0, 0, ""
    try:
        with exclusive(bridge_lock(log, tracker.name), timeout_s=0):
            bridge = Bridge(log, tracker, from_start=from_start)
            before = bridge.cursor.sent
            try:
                bridge.deliver()
                tracker.flush(last=True)
            except TrackerUnavailableError as error:
                problem = str(error)
            bridge.hold_up(problem)
            sent, left_out = bridge.cursor.sent - before, bridge.cursor.rejected
    except TimeoutError:
        problem = "a bridge is sending it now"
    except OSError as error:
        problem = str(refusal(error) or error)
    return SyncResult(log=str(log), tracker=tracker.name, sent=sent, left_out=left_out, problem=problem)


def _run_ui(options: argparse.Namespace) -> int:
    from starling.tracking.mlflow import ui_server

    server, was_running = ui_server.start(
        options.runs, host=options.host, port=options.port, allowed_hosts=options.allowed_hosts
    )
    if options.json:
        print(json.dumps({**asdict(server), "was_running": was_running}))
    else:
        print(
            f"MLflow {'is already' if was_running else 'is'} at {server.url}  (end it: starling track stop)"
        )
    return 0


def _run_stop(options: argparse.Namespace) -> int:
    from starling.tracking.mlflow import ui_server

    server = ui_server.stop(options.runs)
    if options.json:
        print(json.dumps({"stopped": asdict(server) if server else None}))
    else:
        print(f"stopped {server.url}" if server else "no server of this runs folder is running")
    return 0


def _run_sync(options: argparse.Namespace) -> int:
    names = [options.tracker] if options.tracker else [kind.name for kind in wanted_trackers()]
    if not names:
        raise UsageError("no tracker is on; name one with --tracker, or turn it on with starling settings")
    results = []
    name_top(options.directory)
    for name in names:
        tracker = TRACKERS[name].open(options.runs, os.environ)
        results += sync(options.directory, tracker, from_start=options.from_start)
        tracker.close()
    if options.json:
        print(json.dumps([asdict(result) for result in results]))
    else:
        for result in results:
            left_out = f", {result.left_out} left out" if result.left_out else ""
            held_up = f"; the rest is kept: {result.problem}" if result.problem else ""
            print(f"{result.log}: {result.sent} events sent to {result.tracker}{left_out}{held_up}")
    return 1 if any(result.problem for result in results) else 0


def _run_status(options: argparse.Namespace) -> int:
    names = [kind.name for kind in wanted_trackers()]
    rows = [row for log in find_logs(options.directory or options.runs) for row in pending(log, names)]
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        for row in rows:
            parts = [f"{row.sent} sent", f"{row.pending} pending" if row.pending else "nothing pending"]
            parts += [f"{row.left_out} left out"] if row.left_out else []
            parts += [f"{row.dropped} samples of the machine dropped"] if row.dropped else []
            held_up = f" ({row.problem})" if row.problem else ""
            print(f"{Path(row.log).parent}  {row.tracker}: {', '.join(parts)}{held_up}")
    return 1 if any(row.pending for row in rows) else 0


def _run_export(options: argparse.Namespace) -> int:
    directory: Path = options.directory
    target = options.out or Path(f"{real_path(directory).name}.zip")
    count = export(directory, target, force=options.force)
    if options.json:
        print(json.dumps({"file": str(target), "files": count}))
    else:
        print(f"{target}: {count} files, {target.stat().st_size / 1e6:.1f} MB")
    return 0


def _run_promote(options: argparse.Namespace) -> int:
    from starling.tracking.mlflow.models import promote, run_uuid_of
    from starling.tracking.mlflow.tracker import MlflowTracker

    tracker = MlflowTracker(options.runs, os.environ)
    directory = Path(options.which)
    run_id = tracker.find_run(run_uuid_of(directory) if directory.is_dir() else options.which)
    with tracker.errors_as_ours():
        name, version, reached = promote(
            tracker.client,
            run_id,
            metric=options.metric,
            at_least=options.at_least,
            better_than=options.better_than,
            alias=options.to,
        )
    tracker.close()
    if options.json:
        print(json.dumps({"model": name, "version": version, "alias": options.to, options.metric: reached}))
    else:
        print(f"{name} version {version} is {options.to} now: {options.metric} {reached:g}")
    return 0


def _run_upgrade(options: argparse.Namespace) -> int:
    from starling.tracking.mlflow import ui_server
    from starling.tracking.mlflow.tracker import MlflowTracker

    if (server := ui_server.find(options.runs)) is not None:
        raise UsageError(f"{server.url} is served from the database; end it first: starling track stop")
    copy = MlflowTracker(options.runs, {}).upgrade_database()
    if options.json:
        print(json.dumps({"copy": str(copy) if copy else None}))
    elif copy is None:
        print("nothing to upgrade: the database is this MLflow's, or there is none yet")
    else:
        print(
            f"upgraded; copy of the old database: {copy}. Send unsent events with: starling track sync {options.runs}"
        )
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `starling track`."""
    parser = PathParser(
        prog="starling track", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = PathParser(add_help=False)
    common.add_argument(
        "--runs", type=Path, default=runs_root(), help="the runs folder (default: %(default)s)"
    )
    common.add_argument("--json", action="store_true", help="print JSON")
    commands = parser.add_subparsers(
        required=True, metavar="ui | stop | status | sync | export | promote | upgrade"
    )
    ui = commands.add_parser("ui", parents=[common], help="start MLflow's page in the background")
    ui.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    ui.add_argument("--port", type=int, default=5000)
    ui.add_argument(
        "--allowed-hosts", help="Host headers to answer, comma-separated (default: this machine's)"
    )
    ui.set_defaults(run=_run_ui)
    stop = commands.add_parser("stop", parents=[common], help="end the server that ui started")
    stop.set_defaults(run=_run_stop)
    send = commands.add_parser("sync", parents=[common], help="send the unsent events of event logs")
    send.add_argument("directory", type=Path, metavar="DIR", help="a run directory, or a folder of them")
    send.add_argument(
        "--from-start", action="store_true", help="send everything again, to a database that lost it"
    )
    send.add_argument("--tracker", choices=TRACKERS, help="only to this tracker (default: all that are on)")
    send.set_defaults(run=_run_sync)
    status = commands.add_parser("status", parents=[common], help="show how much is sent")
    status.add_argument(
        "directory", type=Path, metavar="DIR", nargs="?", help="a run, or a folder of them (default: --runs)"
    )
    status.set_defaults(run=_run_status)
    pack = commands.add_parser("export", parents=[common], help="write a run as one zip")
    pack.add_argument("directory", type=Path, metavar="DIR", help="a run directory")
    pack.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: NAME.zip, here)")
    pack.add_argument("--force", action="store_true", help="replace an existing file")
    pack.set_defaults(run=_run_export)
    gate = commands.add_parser("promote", parents=[common], help="give a run's model an alias, behind a gate")
    gate.add_argument("which", metavar="RUN_OR_DIR", help="a run directory, or the run's id in MLflow")
    gate.add_argument("--metric", required=True, help="a metric by its name or its last part: mAP_0.5:0.95")
    gate.add_argument(
        "--at-least", type=float, required=True, metavar="X", help="value that the metric must reach"
    )
    gate.add_argument(
        "--better-than", metavar="ALIAS", help="the metric must also beat the model with this alias"
    )
    gate.add_argument(
        "--to", default="production", metavar="ALIAS", help="the alias to give (default: production)"
    )
    gate.set_defaults(run=_run_promote)
    newer = commands.add_parser("upgrade", parents=[common], help="upgrade the database of an older MLflow")
    newer.set_defaults(run=_run_upgrade)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one of the commands; return the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except StarlingError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        refused = refusal(error)
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {refused or f'{where}{error.strerror or error}'}", file=sys.stderr)
        return refused.exit_code if refused else 1
    except KeyboardInterrupt:
        return 130
