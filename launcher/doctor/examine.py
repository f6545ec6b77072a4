"""Run all checks, slow ones in parallel, and return the findings in the order of the report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from launcher.devices.inventory import Gpu, read_gpus
from launcher.doctor import engine_checks, host_checks, one_shot
from launcher.doctor.findings import Finding
from launcher.engines.base import Engine
from launcher.hosts.host import Host
from launcher.hosts.this_machine import ThisMachine
from starling.core import package
from starling.core.errors import StarlingError
from starling.core.units import format_size

Check = Callable[[], list[Finding]]


class ContainerEngine(Engine, Protocol):
    """An engine of containers that also reports about itself."""

    def about(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the engine's `info` and `version`."""


def examine_docker(
    open_engine: Callable[[], ContainerEngine], host: Host, runs: Path, image: str, gpu: str | None
) -> list[Finding]:
    """Check a Docker engine and its machine; `gpu` is the id of the GPU to try, None: the first one of the driver."""
    path = None if host.address else engine_checks.socket_path(host.environment)
    socket = [] if path is None else [engine_checks.check_socket(path)]
    try:
        open_engine()
    except StarlingError as error:
        return [*socket, Finding.of_error("engine", error), *_together(_host(host, runs))]
    remote, gpus = host.remote, host.gpus()
    tried = gpu if gpu is not None else host_checks.first_usable(gpus or ())
    checks = [
        lambda: _about(open_engine(), gpus, remote=remote),
        lambda: [host_checks.check_gpus(gpus, remote=remote)],
        lambda: _in_container(open_engine(), runs, image, tried),
        lambda: [] if remote else [engine_checks.check_compose()],
        *_host(host, runs),
    ]
    return [*socket, *_together(checks)]


def examine_local(runs: Path) -> list[Finding]:
    """Check this machine for the local engine."""
    return _together(
        [
            _trainer,
            _machine,
            lambda: [host_checks.check_gpus(read_gpus(), remote=False)],
            *_host(ThisMachine(), runs),
        ]
    )


def _together(checks: list[Check]) -> list[Finding]:
    with ThreadPoolExecutor(len(checks)) as pool:
        return [finding for found in pool.map(lambda check: check(), checks) for finding in found]


def _host(host: Host, runs: Path) -> list[Check]:
    return [lambda: host_checks.check_runs_folder(host, runs), lambda: [host_checks.check_tracking()]]


def _about(engine: ContainerEngine, gpus: tuple[Gpu, ...] | None, *, remote: bool) -> list[Finding]:
    """Check what the engine reports about itself; no other thread may use `engine`."""
    try:
        before = time.time()
        about, version = engine.about()
        after = time.time()
    except StarlingError as error:
        return [Finding.of_error("engine", error)]
    return [
        engine_checks.check_version(version),
        engine_checks.check_machine(about),
        engine_checks.check_limits(about),
        engine_checks.check_clock(about, before, after),
        engine_checks.check_docker_disk(about, remote=remote),
        engine_checks.check_gpu_runtime(about, gpus),
    ]


def _in_container(engine: Engine, runs: Path, image: str, gpu: str | None) -> list[Finding]:
    try:
        found = engine.resolve_image(image)
        user = engine.host.replica_user(runs, None)
    except StarlingError as error:
        return [Finding.of_error("image", error)]
    driver = host_checks.check_driver_for(found, engine.host.driver())
    return driver + one_shot.probe(
        engine, image, runs if _is_ready(engine.host, runs, user) else None, user, gpu
    )


def _is_ready(host: Host, runs: Path, user: str) -> bool:
    """Return whether replicas can use the runs folder: it exists, and if root runs `up`, the replicas' user owns it."""
    owner = None if host.remote and not host.address else host.owner_of(runs)
    return owner is not None and (host.uid != 0 or owner == int(user.split(":")[0]))


def _trainer() -> list[Finding]:
    from launcher.options.training_args import check_local_trainer

    try:
        check_local_trainer()
        return [Finding("trainer", "ok", str(package.PARENT / "starling"))]
    except StarlingError as error:
        return [Finding.of_error("trainer", error)]


def _machine() -> list[Finding]:
    import psutil

    memory: Any = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0))
    return [Finding("machine", "ok", f"{cores} cores, {format_size(int(memory.total))} of memory")]
