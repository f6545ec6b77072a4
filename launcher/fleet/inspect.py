"""Collect all facts that `up` decides on, and return them as a value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import ParamSpec

from launcher.engines.base import Engine
from launcher.fleet.holders import find_holders
from launcher.hosts.access import look_at_reads, look_at_runs, state_of
from launcher.hosts.files import HostFiles
from launcher.options.request import Request
from launcher.parallel import in_parallel
from launcher.plan.facts import Access, Facts, SecretFile
from launcher.plan.plan import CLEARML_FILE, make_plan
from starling.core.errors import StarlingError

PASSWORD_FILES = ("STARLING_STUDY_PASSWORD_FILE", "MLFLOW_TRACKING_PASSWORD_FILE")
"""Variables that name a file with a password; replicas see the file at the same path."""

P = ParamSpec("P")


def inspect(request: Request, engine: Engine) -> Facts:
    """Return the facts that the plan for the request depends on; raises EngineError if the engine fails."""
    facts = inspect_again(Facts(machine=engine.machine()), request, engine)
    host, isolated = engine.host, request.entrypoint.isolated
    judged = isolated and not host.remote and not facts.machine.maps_users
    facts = replace(
        facts,
        engine=engine.name,
        behind_ssh=bool(host.address),
        uid=host.uid,
        owner=host.owner,
        secrets=tuple(look_at_secrets(request, host.files, judged=judged)) if isolated else (),
        runs_owner=host.owner_of(request.runs),
        disk=None if host.remote else host.disk_space(request.runs),
        access=_look_at_access(request) if judged else None,
    )
    return _ask_engine(facts, request, engine)


def inspect_again(facts: Facts, request: Request, engine: Engine) -> Facts:
    """Return the facts with devices, their holders and replicas read again: another `up` may have changed them."""
    gpus = engine.host.gpus()
    if gpus is None and not request.entrypoint.isolated:
        gpus = ()  # processes use this machine's GPUs, and it has none
    replicas = engine.list()
    existing = tuple(state for state in replicas if state.fleet == request.args.fleet)
    others = tuple(state for state in replicas if state.fleet != request.args.fleet)
    holders = find_holders(engine, gpus, {state.id for state in existing}) if request.wants_gpus(gpus) else ()
    living = [state.id for state in existing if state.live]
    started_with = {done.item: done.value for done in in_parallel(engine.environment, living)}
    facts = replace(
        facts,
        gpus=gpus,
        holders=holders,
        existing=existing,
        others=others,
        environments={key: variables for key, variables in started_with.items() if variables is not None},
    )
    names = [spec.name for spec in make_plan(request, facts).replicas]
    return replace(facts, refusals=replace(facts.refusals, names=_refusal(engine.check_names, names)))


def _ask_engine(facts: Facts, request: Request, engine: Engine) -> Facts:
    """Return the facts with the engine's answers about the network, the image, and the image's GPU runtime."""
    refusals = replace(facts.refusals, network=_refusal(engine.check_network, request.network))
    try:
        image = engine.resolve_image(request.image)
    except StarlingError as missing:
        return replace(facts, refusals=replace(refusals, image=missing))
    entrypoint, wants_gpu = request.entrypoint, request.wants_gpus(facts.gpus)
    script = (entrypoint.supervisor or entrypoint.trainer)[-1]
    refusals = replace(
        refusals,
        trainer=_refusal(engine.check_trainer, image, script),
        gpu_runtime=_refusal(engine.check_gpu_runtime, image) if wants_gpu else None,
    )
    driver = engine.host.driver() if wants_gpu and image.cuda else None
    return replace(facts, image=image, refusals=refusals, driver=driver)


def _refusal(ask: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> StarlingError | None:
    """Return the error that the engine's check raises; None if it raises none."""
    try:
        ask(*args, **kwargs)
    except StarlingError as refusal:
        return refusal
    return None


def look_at_secrets(request: Request, files: HostFiles, *, judged: bool) -> Iterator[SecretFile]:
    """Yield the files that the user's variables name; with `judged`, also their permissions."""
    for variable in (*PASSWORD_FILES, CLEARML_FILE):
        if named := request.passed.get(variable):
            path = files.expand(files.start, named) if variable == CLEARML_FILE else Path(named)
            is_file = path.is_absolute() and files.is_file(path)
            yield SecretFile(
                variable=variable,
                path=path,
                is_file=is_file,
                state=state_of(path) if is_file and judged else None,
            )


def _look_at_access(request: Request) -> Access:
    shown = [Path(mount.source) for mount in request.args.mounts]
    return Access(
        reads=look_at_reads(request.args.reads, shown), runs=look_at_runs(request.runs, request.args.fleet)
    )
