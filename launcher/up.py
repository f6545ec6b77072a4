"""`launcher up`, step by step: read, look, plan; then show it, or do it."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import click

from launcher import fleet
from launcher.claims import NOBODY
from launcher.cli import absolute, open_engine, say
from launcher.dry_run import show_plan
from launcher.engines.base import Engine
from launcher.env_file import read_env_file
from launcher.errors import LauncherError, UsageError
from launcher.holders import find_occupancy
from launcher.host_lock import host_lock
from launcher.inventory import read_gpus
from launcher.ownership import caller_ids
from launcher.plan import (
    DEFAULT_IMAGE,
    RUNS_IN_IMAGE,
    TRAINER_IN_IMAGE,
    Placement,
    Plan,
    Request,
    make_plan,
    passed_variables,
)
from launcher.runs_folder import check_runs, replica_user, runs_folder
from launcher.sizes import parse_size
from launcher.training_args import prepare_args, trainer_script


def run_up(options: dict[str, Any]) -> None:
    """Do what `launcher up` asks for, from click's options; raises LauncherError with nothing started."""
    if options["as_json"] and not options["dry_run"]:
        raise UsageError("--json: goes with --dry-run; `launcher status --json` reports what runs")
    runs = absolute(options["runs"])
    placement = place(options["engine"], runs)
    request = read_request(options, runs, placement)
    engine = open_engine(options["engine"], runs)
    if options["dry_run"]:
        _show(draw_up(request, placement, engine, strict=False), as_json=options["as_json"])
        return
    signal.signal(signal.SIGTERM, _end_like_interrupt)
    draw_up(request, placement, engine)  # refuses before the runs folder is touched
    with runs_folder(runs, request.user, say), host_lock(say) as lock:
        plan = draw_up(request, placement, engine)  # again, now that nobody else can be starting anything
        for note in plan.notes:
            say(f"note: {note}")
        outcome = fleet.bring_up(
            engine,
            plan.replicas,
            recreate=request.recreate,
            settle_s=options["settle"],
            say=say,
            started=lock.release,
        )
    _tell(plan, outcome, engine)


def place(engine: str, runs: Path) -> Placement:
    """Return how the engine of this name starts a trainer."""
    if engine == "local":
        script = trainer_script()
        # `train.py` imports the package it lies in, from wherever it is called.
        path = os.pathsep.join(filter(None, (str(script.parent.parent), os.environ.get("PYTHONPATH"))))
        return Placement(
            engine=engine,
            trainer=(sys.executable, str(script)),
            runs_inside=str(runs),
            isolated=False,
            environment={"PYTHONPATH": path},
        )
    return Placement(engine=engine, trainer=TRAINER_IN_IMAGE, runs_inside=RUNS_IN_IMAGE, isolated=True)


def read_request(options: dict[str, Any], runs: Path, placement: Placement) -> Request:
    """Return click's options as a request; checks everything that needs no engine."""
    check_runs(runs)
    args = prepare_args(
        options["training_args"],
        cwd=Path.cwd(),
        runs=runs,
        runs_inside=placement.runs_inside,
        isolated=placement.isolated,
    )
    from_files: dict[str, str] = {}
    for path in options["env_files"]:
        from_files.update(read_env_file(path, os.environ))
    return Request(
        args=args,
        runs=runs,
        gpus=options["gpus"],
        cpus=options["cpus"],
        ddp=options["ddp"],
        force=options["force"],
        recreate=options["recreate"],
        memory_bytes=parse_size(options["memory"]) if options["memory"] else None,
        shm_bytes=parse_size(options["shm"], "--shm") if options["shm"] else None,
        image=options["image"] or DEFAULT_IMAGE,
        network=options["network"],
        user=replica_user(runs, caller_ids(), options["user"]) if placement.isolated else "",
        passed=passed_variables(os.environ, options["env_names"], from_files),
    )


def draw_up(request: Request, placement: Placement, engine: Engine, *, strict: bool = True) -> Plan:
    """Look at the engine and the machine, and return the plan.

    Not `strict`, for --dry-run: an image that has yet to be built is no reason to show nothing.
    """
    gpus = None if engine.remote else read_gpus()
    if gpus is None and not placement.isolated:
        gpus = ()  # processes use this very machine's GPUs, and it has none
    occupancy = NOBODY
    if request.wants_gpus(gpus):
        own = [state for state in engine.list() if state.fleet == request.args.fleet]
        occupancy = find_occupancy(engine, gpus, own, caller_ids()[0], recreate=request.recreate)
    notes: tuple[str, ...] = ()
    plan = make_plan(request, placement, engine.machine(), gpus, "", occupancy)
    try:
        engine.check_network(request.network)
        image_id = engine.resolve_image(request.image)
    except LauncherError as error:
        if strict:
            raise
        image_id, notes = "", (f"would fail now: {error}",)
    plan = make_plan(request, placement, engine.machine(), gpus, image_id, occupancy)
    return Plan(engine=plan.engine, fleet=plan.fleet, replicas=plan.replicas, notes=(*plan.notes, *notes))


def _show(plan: Plan, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(plan.public(), indent=2))
        return
    for line in show_plan(plan, caller_ids()[0]):
        click.echo(line)
    for note in plan.notes:
        click.echo(f"note: {note}")


def _tell(plan: Plan, outcome: fleet.Outcome, engine: Engine) -> None:
    """Say what happened, and how to watch it."""
    if outcome.running:
        say(f"already running: {', '.join(outcome.running)}")
    if outcome.finished:
        say(f"already finished: {', '.join(outcome.finished)} (--recreate runs them again)")
    first = plan.replicas[0].name
    where = "" if engine.name == "docker" else f" --engine local --runs {plan.replicas[0].runs}"
    say(f"fleet {plan.fleet}: {len(outcome.started)} started, {len(outcome.running)} already running")
    say(f"  watch      launcher status --watch{where}")
    if engine.name == "docker":
        say(f"  output     docker attach --sig-proxy=false {first}")
    else:
        say(f"  output     launcher attach{where} {first}")
    say(f"  end all    launcher kill-all{where}")


def _end_like_interrupt(number: int, frame: FrameType | None) -> None:
    """Make SIGTERM undo a half-started fleet, as Ctrl-C does."""
    raise KeyboardInterrupt
