"""`launcher up`, step by step: read, look, plan; then show it, or do it."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import click

from launcher.cli.context import Target
from launcher.console import say
from launcher.devices.holders import NOBODY
from launcher.engines.base import Engine, Image
from launcher.fleet import bring_up as fleet
from launcher.fleet.holders import find_occupancy
from launcher.hosts.host import Host
from launcher.hosts.processes import caller_ids
from launcher.options.env_file import read_env_file
from launcher.options.training_args import TrainingArgs, check_local_trainer, means, prepare_args
from launcher.plan.check import check_all, preflight_notes
from launcher.plan.dry_run import rehearsal_notes, show_plan
from launcher.plan.plan import (
    DEFAULT_IMAGE,
    RUNS_IN_IMAGE,
    SUPERVISOR_IN_IMAGE,
    TRAINER_IN_IMAGE,
    Placement,
    Plan,
    Request,
    make_plan,
    passed_variables,
)
from launcher.plan.secret_files import with_secret_files
from launcher.problems import Problems, exit_code_of
from launcher.sizes import parse_size
from starling.core import package
from starling.core.errors import UsageError
from starling.core.paths import absolute


def run_up(target: Target, options: dict[str, Any]) -> None:
    """Do what `launcher up` asks for, from its options; raises StarlingError with nothing started."""
    if options["as_json"] and not options["dry_run"]:
        raise UsageError("--json: goes with --dry-run; `launcher status --json` reports what runs")
    if options["build"] and target.engine == "local":
        raise UsageError("--build: makes an image, and --engine local needs none; leave it out")
    if options["build"] and target.engine == "podman":
        raise UsageError(
            f"--build: builds with Docker; in the project's folder: podman build -t {options['image']} .  "
            f"(or bring it over: docker save {options['image']} | podman load)"
        )
    host = target.find_host()
    runs = host.files.expand(host.files.start, str(target.runs))
    placement = place(target.engine, runs)
    problems = Problems()
    request = problems.check(read_request, options, host, runs, placement)
    engine = problems.check(target.open_engine, host)
    if request is None or engine is None:
        if engine is not None and not options["build"]:
            problems.check(engine.resolve_image, options["image"] or DEFAULT_IMAGE)
        problems.refuse()
    if options["tracking"]:
        request = join_servers(request, placement, engine, target.host)
    if options["dry_run"]:
        plan, _ = draw_up(request, placement, engine, strict=False, to_build=options["build"])
        sys.exit(_show(plan, options))
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` asks for
            signal.signal(number, _end_like_interrupt)
    if options["build"]:
        from launcher.fleet.build import build_image

        build_image(request.image, Path.cwd(), host.environment)
    _, image = draw_up(request, placement, engine)  # refuses before the runs folder is touched
    with host.hold(runs, request.user, say) as release:
        # Again, now that nobody else can be starting anything.
        plan, _ = draw_up(request, placement, engine, checked=image)
        for note in plan.notes:
            say(f"note: {note}")
        outcome = fleet.bring_up(
            engine,
            plan.replicas,
            recreate=request.recreate,
            settle_s=options["settle"],
            say=say,
            started=release,
        )
    _tell(plan, outcome, engine)


def place(engine: str, runs: Path) -> Placement:
    """Return how the engine of this name starts a trainer."""
    if engine == "local":
        check_local_trainer()
        return Placement(
            engine=engine,
            trainer=tuple(package.command("train")),
            supervisor=(sys.executable, "-S", "-P", "-m", "starling.supervise"),
            runs_inside=str(runs),
            isolated=False,
            environment={"PYTHONPATH": package.python_path()},
        )
    return Placement(
        engine=engine,
        trainer=TRAINER_IN_IMAGE,
        supervisor=SUPERVISOR_IN_IMAGE,
        runs_inside=RUNS_IN_IMAGE,
        isolated=True,
    )


def read_request(options: dict[str, Any], host: Host, runs: Path, placement: Placement) -> Request:
    """Return click's options as a request; checks everything that needs no engine, and raises all that is wrong."""
    problems = Problems()
    problems.check(host.check_runs, runs)
    args = problems.check(
        _read_training,
        options["training_args"],
        cwd=host.files.start,
        runs=runs,
        runs_inside=placement.runs_inside,
        isolated=placement.isolated,
        files=host.files,
    )
    memory = problems.check(parse_size, options["memory"]) if options["memory"] else None
    shm = problems.check(parse_size, options["shm"], "--shm") if options["shm"] else None
    user = problems.check(host.replica_user, runs, options["user"]) if placement.isolated else ""
    from_files: dict[str, str] = {}
    for path in options["env_files"]:
        from_files.update(problems.check(read_env_file, path, os.environ) or {})
    passed = problems.check(passed_variables, os.environ, options["env_names"], from_files)
    problems.raise_any()
    assert args is not None
    return Request(
        args=args,
        runs=runs,
        gpus=options["gpus"],
        cpus=options["cpus"],
        ddp=options["ddp"],
        force=options["force"],
        recreate=options["recreate"],
        memory_bytes=memory,
        shm_bytes=shm,
        image=options["image"] or DEFAULT_IMAGE,
        network=options["network"],
        max_restarts=options["max_restarts"],
        user=user or "",
        passed=passed or {},
    )


def _read_training(words: Sequence[str], **where: Any) -> TrainingArgs:
    """Return the training arguments, as `prepare_args` does.

    Raises UsageError for the launcher's own options among them, where a trainer would get them: a dry run would start.
    """
    own = {flag for option in click.get_current_context().command.params for flag in option.opts}
    wrong = [word for word in words if word.split("=", 1)[0] in own and means(word) is None]
    if wrong:
        raise UsageError(
            f"{', '.join(wrong)}: after `--`, where the trainer would get it; write what is the launcher's before `--`"
        )
    return prepare_args(words, **where)


def join_servers(request: Request, placement: Placement, engine: Engine, address: str | None) -> Request:
    """Return the request for replicas that log to the tracking servers; raises EngineError unless those are up."""
    from launcher.engines.docker.docker import DockerEngine
    from launcher.engines.opening import find_host, open_docker
    from launcher.servers.addresses import check_network_choice, join

    docker = engine if isinstance(engine, DockerEngine) else open_docker(find_host("docker", address))
    tracking = join(docker, isolated=placement.isolated)
    if placement.isolated:
        check_network_choice(request.network, tracking)
    own = {name: value for name, value in request.passed.items() if not name.startswith("MLFLOW_TRACKING_")}
    if left_out := sorted(request.passed.keys() - own.keys()):
        click.echo(f"note: --tracking: {', '.join(left_out)} of yours left out", err=True)
    return replace(
        request,
        network=tracking.network or request.network,
        passed={**own, **tracking.passed},
        settings=tracking.environment,
        volumes=tracking.mounts,
    )


def draw_up(
    request: Request,
    placement: Placement,
    engine: Engine,
    *,
    strict: bool = True,
    to_build: bool = False,
    checked: Image | None = None,
) -> tuple[Plan, Image]:
    """Look at the engine and the machine, check everything, and return the plan and the image it stands on.

    Not `strict`, for --dry-run: what is wrong is told in the plan then, and an image `to_build` may be missing. With the `checked` image
    of a plan that was drawn up a moment ago, only what may have changed since is looked at again.
    """
    gpus = engine.host.gpus()
    if gpus is None and not placement.isolated:
        gpus = ()  # processes use this very machine's GPUs, and it has none
    listed = engine.list()
    occupancy = NOBODY
    if request.wants_gpus(gpus):
        own = [state for state in listed if state.fleet == request.args.fleet]
        occupancy = find_occupancy(engine, gpus, own, caller_ids()[0], recreate=request.recreate)
    machine = engine.machine()
    problems = Problems()
    if placement.isolated:
        request = problems.check(with_secret_files, request, engine.host.files) or request
    image = checked or (Problems() if to_build else problems).check(engine.resolve_image, request.image)
    image_id = image.id if image else ""
    plan = problems.check(make_plan, request, placement, machine, gpus, image_id, occupancy, problems)
    if checked is None:
        problems.check(engine.check_network, request.network)
        wants_gpu = request.wants_gpus(gpus)
        check_all(request, placement, engine, machine, image, wants_gpu=wants_gpu, problems=problems)
    if strict or plan is None:
        problems.raise_any()
    assert plan is not None
    others = [state for state in listed if state.fleet != request.args.fleet]
    notes = [*plan.notes, *preflight_notes(request, plan, machine, others)]
    if not strict:
        existing = [state for state in listed if state.fleet == request.args.fleet]
        # Without an image a fleet that stands cannot be told from the one asked for.
        compared = existing if image is not None else []
        problems.check(fleet.check_existing, engine, plan.replicas, compared, recreate=request.recreate)
        notes += rehearsal_notes(existing, recreate=request.recreate)
        notes += [f"{request.image} would be built first"] * to_build
    plan = replace(plan, engine=engine.name, notes=tuple(notes), problems=tuple(problems.found))
    return plan, image or Image(name=request.image)


def _show(plan: Plan, options: Mapping[str, Any]) -> int:
    """Print the plan and return the exit code that `up` would end with now."""
    if options["as_json"]:
        click.echo(json.dumps(plan.public(), indent=2))
    else:
        for line in show_plan(plan, caller_ids()[0], [absolute(path) for path in options["env_files"]]):
            click.echo(line)
    return exit_code_of(plan.problems)


def _tell(plan: Plan, outcome: fleet.Outcome, engine: Engine) -> None:
    """Say what happened, and how to watch it."""
    if outcome.running:
        say(f"already running: {', '.join(outcome.running)}")
    if outcome.finished:
        say(f"already finished: {', '.join(outcome.finished)} (--recreate runs them again)")
    first = plan.replicas[0].name
    where = "" if engine.name == "docker" else f" --engine {engine.name} --runs {plan.replicas[0].runs}"
    where += f" --host {engine.host.address}" if engine.host.address else ""
    say(f"fleet {plan.fleet}: {len(outcome.started)} started, {len(outcome.running)} already running")
    say(f"  watch      launcher status --watch{where}")
    if engine.name == "local" or engine.host.address:
        say(f"  output     launcher attach{where} {first}")
    else:
        say(f"  output     {engine.name} attach --sig-proxy=false {first}")
    say(f"  end all    launcher kill-all{where}")


def _end_like_interrupt(number: int, frame: FrameType | None) -> None:
    """Make SIGTERM, and a terminal that goes, undo a half-started fleet, as Ctrl-C does."""
    raise KeyboardInterrupt
