"""The steps of `launcher up`: read, inspect, plan, check; then show the plan, or act on it."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from launcher.console import say
from launcher.engines.base import Engine
from launcher.fleet.bring_up import bring_up
from launcher.fleet.inspect import inspect, inspect_again
from launcher.options.request import DEFAULT_IMAGE, Entrypoint, Request, read_request
from launcher.plan.check import check
from launcher.plan.dry_run import describe, document
from launcher.plan.plan import Plan, make_plan
from launcher.problems import Problems, exit_code_of, raise_all
from starling.core.errors import UsageError

if TYPE_CHECKING:
    from launcher.cli.context import Target
    from launcher.hosts.host import Host


def run_up(target: Target, options: Mapping[str, Any]) -> None:
    """Run `launcher up`; raises StarlingError with nothing started."""
    _check_options(target.engine, options)
    host = target.find_host()
    request, engine = _read(target, host, options)
    if options["tracking"]:
        request = _join_servers(request, engine, target.host)
    if options["dry_run"]:
        sys.exit(_rehearse(request, engine, as_json=options["as_json"]))
    _end_like_interrupt()
    if request.build:
        request = _build(request, host)
    facts = inspect(request, engine)
    raise_all(check(make_plan(request, facts), facts))  # before the runs folder is touched
    with host.hold(request.runs, request.user) as release:
        facts = inspect_again(facts, request, engine)  # now that no other `up` can start anything
        plan = make_plan(request, facts)
        raise_all(check(plan, facts))
        for note in plan.notes:
            say(f"note: {note}")
        bring_up(engine, plan.changes, settle_s=options["settle"], started=release)
    _tell(plan, engine)


def _check_options(engine: str, options: Mapping[str, Any]) -> None:
    """Raise UsageError for options that exclude each other."""
    if options["as_json"] and not options["dry_run"]:
        raise UsageError("--json: goes with --dry-run; `launcher status --json` reports what runs")
    if options["build"] and engine == "local":
        raise UsageError("--build: makes an image, and --engine local needs none; leave it out")
    if options["build"] and engine == "podman":
        raise UsageError(
            f"--build: builds with Docker; in the project's folder: podman build -t {options['image']} .  "
            f"(or bring it over: docker save {options['image']} | podman load)"
        )


def _read(target: Target, host: Host, options: Mapping[str, Any]) -> tuple[Request, Engine]:
    """Return the request and the engine; raises every problem of either together, a missing image included."""
    runs = host.files.expand(host.files.start, str(target.runs))
    entrypoint = Entrypoint.of(target.engine, runs)
    own_flags = {flag for option in click.get_current_context().command.params for flag in option.opts}
    problems = Problems()
    request = problems.check(read_request, options, host, runs, entrypoint, own_flags)
    engine = problems.check(target.open_engine, host)
    if request is None or engine is None:
        if engine is not None and not options["build"]:
            problems.check(engine.resolve_image, options["image"] or DEFAULT_IMAGE)
        problems.refuse()
    return request, engine


def _join_servers(request: Request, engine: Engine, address: str | None) -> Request:
    """Return the request for replicas that log to the tracking servers; raises EngineError if the servers are down.

    `address` is the Docker engine's, if `--host` gives one.
    """
    from launcher.engines.docker.docker import DockerEngine
    from launcher.engines.opening import find_host, open_docker
    from launcher.servers.addresses import OWN_PREFIX, with_servers

    docker = engine if isinstance(engine, DockerEngine) else open_docker(find_host("docker", address))
    joined = with_servers(request, docker)
    if left_out := sorted(name for name in request.passed if name.startswith(OWN_PREFIX)):
        click.echo(f"note: --tracking: {', '.join(left_out)} of yours left out", err=True)
    return joined


def _rehearse(request: Request, engine: Engine, *, as_json: bool) -> int:
    """Print the plan and its problems, and return the exit code that `up` would end with now."""
    facts = inspect(request, engine)
    plan = make_plan(request, facts)
    problems = check(plan, facts)
    if plan.refusal is not None:
        raise_all(problems)
    if as_json:
        click.echo(json.dumps(document(plan, problems), indent=2))
    else:
        click.echo("\n".join(describe(plan, facts, problems)))
    return exit_code_of(problems)


def _build(request: Request, host: Host) -> Request:
    """Build the image, and return the request with `build` switched off."""
    from launcher.fleet.build import build_image

    build_image(request.image, Path.cwd(), host.environment)
    return replace(request, build=False)


def _tell(plan: Plan, engine: Engine) -> None:
    """Say what was started, and how to watch it."""
    changes = plan.changes
    if changes.running:
        say(f"already running: {', '.join(changes.running)}")
    if changes.finished:
        say(f"already finished: {', '.join(changes.finished)} (--recreate runs them again)")
    first, address = plan.replicas[0].name, engine.host.address
    where = "" if engine.name == "docker" else f" --engine {engine.name} --runs {plan.request.runs}"
    where += f" --host {address}" if address else ""
    say(f"fleet {plan.fleet}: {len(changes.start)} started, {len(changes.running)} already running")
    say(f"  watch      launcher status --watch{where}")
    if engine.name == "local" or address:
        say(f"  output     launcher attach{where} {first}")
    else:
        say(f"  output     {engine.name} attach --sig-proxy=false {first}")
    say(f"  end all    launcher kill-all{where}")


def _end_like_interrupt() -> None:
    """Make SIGTERM and SIGHUP (a closed terminal) undo a half-started fleet, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` ignores SIGHUP
            signal.signal(number, interrupt)
