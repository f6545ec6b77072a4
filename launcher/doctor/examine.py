"""All checks, in the order in which they are told; those that wait do so at the same time."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from launcher.devices.inventory import Gpu, read_driver, read_gpus
from launcher.doctor import engine_checks, host_checks, one_shot
from launcher.doctor.findings import Finding
from launcher.engines.base import Engine
from launcher.hosts.host import Host
from launcher.hosts.ssh_connection import SshConnection
from launcher.hosts.ssh_host import SshHost
from launcher.sizes import format_size
from starling.core import package
from starling.core.errors import StarlingError

Check = Callable[[], list[Finding]]


class ContainerEngine(Engine, Protocol):
    """An engine of containers, which knows itself."""

    def about(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return its `info` and its `version`."""


def examine_docker(
    open_engine: Callable[[], ContainerEngine], site: Host, image: str, gpu: str | None
) -> list[Finding]:
    """Look at a Docker engine and its machine; `gpu` is the id to try, else the first that the driver lists."""
    box = site.box if isinstance(site, SshHost) else None
    path = engine_checks.socket_path() if box is None else None
    socket = [] if path is None else [engine_checks.check_socket(path)]
    try:
        engine = open_engine()
    except StarlingError as error:
        return [*socket, Finding.of_error("engine", error), *_together(_host(site.runs, box))]
    remote = engine.remote
    gpus = site.gpus(engine)
    tried = gpu if gpu is not None else host_checks.first_usable(gpus or ())
    checks = [
        lambda: _about(open_engine(), gpus, remote=remote),
        lambda: [host_checks.check_gpus(gpus, remote=remote)],
        lambda: _in_container(open_engine(), site, image, tried),
        lambda: [] if remote else [engine_checks.check_compose()],
        *_host(site.runs, box),
    ]
    return [*socket, *_together(checks)]


def examine_local(runs: Path) -> list[Finding]:
    """Look at this machine as the local engine uses it."""
    return _together(
        [_trainer, _machine, lambda: [host_checks.check_gpus(read_gpus(), remote=False)], *_host(runs, None)]
    )


def _together(checks: list[Check]) -> list[Finding]:
    with ThreadPoolExecutor(len(checks)) as pool:
        return [finding for found in pool.map(lambda check: check(), checks) for finding in found]


def _host(runs: Path, box: SshConnection | None) -> list[Check]:
    return [lambda: host_checks.check_runs_folder(runs, box), lambda: [host_checks.check_tracking()]]


def _about(engine: ContainerEngine, gpus: tuple[Gpu, ...] | None, *, remote: bool) -> list[Finding]:
    """Ask the engine about itself; `engine` is a handle of this thread's own."""
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


def _in_container(engine: Engine, site: Host, image: str, gpu: str | None) -> list[Finding]:
    try:
        found = engine.resolve_image(image)
        user = site.replica_user(None)
    except StarlingError as error:
        return [Finding.of_error("image", error)]
    driver = [] if engine.remote else host_checks.check_driver_for(found, read_driver())
    return driver + one_shot.probe(
        engine, image, site.runs if _is_ready(engine, site, user) else None, user, gpu
    )


def _is_ready(engine: Engine, site: Host, user: str) -> bool:
    """Return whether the runs folder is there as `up` leaves it: root's own is handed to the replicas' user first."""
    if isinstance(site, SshHost):
        place = shlex.quote(str(site.runs))
        code, owner = site.box.ask(f"[ -d {place} ] && stat -c %u -- {place}")
        return code == 0 and (site.box.ids[0] != 0 or owner.strip() == user.split(":")[0])
    if engine.remote or not site.runs.is_dir():
        return False
    return os.getuid() != 0 or site.runs.stat().st_uid == int(user.split(":")[0])


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
