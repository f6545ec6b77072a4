"""Everything `up` checks before it starts anything, beyond what the plan itself needs; each refusal has its remedy."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from launcher.devices.inventory import Driver, Machine, read_driver
from launcher.engines.base import Engine, Image, ReplicaState
from launcher.errors import EngineError
from launcher.hosts.access import check_data, check_runs_access, check_secret_file
from launcher.plan.plan import Placement, Plan, Request
from launcher.plan.secret_files import CLEARML_FILE, secret_files
from launcher.problems import Problems
from launcher.sizes import GIB, format_size
from starling.core.errors import UsageError

LEAST_FREE_BYTES = GIB
"""Below this a search does not come far: a run of the smallest model takes some 50 MB, of the largest over 1 GB."""
LEAST_FREE_FILES = 1000

DRIVER_FOR_CUDA = {11: "450", 12: "525", 13: "580"}
"""The first driver branch that runs every release of a CUDA major version (NVIDIA's minor-version compatibility)."""


def check_all(
    request: Request,
    placement: Placement,
    engine: Engine,
    machine: Machine,
    image: Image | None,
    *,
    wants_gpu: bool,
    problems: Problems,
) -> None:
    """Run every check that does not depend on the plan; refusals gather in `problems`.

    `image` is None when it is not there, which somebody else has told.
    """
    if image is not None:
        problems.check(engine.check_trainer, image, (placement.supervisor or placement.trainer)[-1])
    if image is not None and wants_gpu:
        problems.check(engine.check_gpu_runtime, image)
        if image.cuda and not engine.host.remote:
            problems.check(check_driver, image, read_driver())
    if not engine.host.remote:
        problems.check(check_disk, request.runs)
    if placement.isolated:
        problems.check(check_study_address, request.args.command.config.study, request.network)
        if not engine.host.remote and not machine.maps_users:
            problems.check(check_runs_access, request.runs, request.args.fleet, request.user, os.getuid())
            shown = [Path(mount.source) for mount in request.args.mounts]
            problems.check(check_data, request.args.reads, shown, request.user)
            for variable, secret in secret_files(request):
                if secret.is_file():  # else it was refused
                    problems.check(check_secret_file, secret, request.user, variable)


def check_driver(image: Image, driver: Driver | None) -> None:
    """Raise EngineError for a driver older than the CUDA in the image; what is not known is not judged."""
    major = (image.cuda or "").split(".")[0]
    if driver is None or not major.isdigit() or driver.cuda[0] >= int(major):
        return
    branch = DRIVER_FOR_CUDA.get(int(major))
    needed = f"driver {branch} or newer" if branch else f"a driver for CUDA {major}"
    raise EngineError(
        f"image {image.name} holds CUDA {image.cuda} and this machine's NVIDIA driver {driver.version} serves CUDA "
        f"{driver.cuda[0]}.{driver.cuda[1]} at most; install {needed}, or use an image built for CUDA {driver.cuda[0]}"
    )


def check_disk(runs: Path) -> None:
    """Raise UsageError when the disk of the runs folder is all but full, in bytes or in files."""
    place = next(parent for parent in (runs, *runs.parents) if parent.exists())
    disk = os.statvfs(place)
    free = disk.f_bavail * disk.f_frsize
    if free < LEAST_FREE_BYTES:
        raise UsageError(
            f"--runs {runs}: {format_size(free)} free on its disk, and checkpoints need at least "
            f"{format_size(LEAST_FREE_BYTES)}; make room, or give a folder on another disk"
        )
    if disk.f_files and disk.f_favail < LEAST_FREE_FILES:
        raise UsageError(
            f"--runs {runs}: its disk takes only {disk.f_favail} more files; remove some, or give a folder on another disk"
        )


def check_study_address(study: str, network: str) -> None:
    """Raise UsageError for a study's database at an address that means the container itself."""
    where = _loopback(study)
    if where and network != "host":
        raise UsageError(
            f"--study: {where} is the replica itself, not this machine, on network {network}; name the database by an "
            "address that containers reach, join its network with --network, or use --network host"
        )


def preflight_notes(
    request: Request, plan: Plan, machine: Machine, others: Sequence[ReplicaState]
) -> tuple[str, ...]:
    """Return what is worth knowing and stops nothing."""
    notes = _unreachable_trackers(request.passed, request.network) if plan.engine != "local" else []
    if plan.engine != "local" and CLEARML_FILE in request.passed:
        notes.append(
            f"{CLEARML_FILE}={request.passed[CLEARML_FILE]}: no such file; without CLEARML_API_ACCESS_KEY and "
            "CLEARML_API_SECRET_KEY nothing is sent to ClearML"
        )
    taken = sum(other.memory_bytes for other in others if other.live)
    wanted = sum(spec.memory_bytes for spec in plan.replicas)
    if taken and taken + wanted > machine.memory_bytes:
        notes.append(
            f"memory: fleets that run here may take {format_size(taken)}, this one {format_size(wanted)}, and the machine "
            f"has {format_size(machine.memory_bytes)}; lower --memory, or end the others, to be safe from the kernel's killer"
        )
    return tuple(notes)


def _unreachable_trackers(passed: Mapping[str, str], network: str) -> list[str]:
    """Return a note for each server that the user's variables name and that cannot be reached inside a container."""
    if network == "host":
        return []
    return [
        f"{name}: {where} is the replica itself, not this machine, on network {network}: nothing will arrive there. For "
        "the servers of `launcher track up` say --tracking and leave the variable out; or name an address that containers reach"
        for name, value in sorted(passed.items())
        if (where := _loopback(value))
    ]


def _loopback(url: str) -> str:
    """Return `host:port` of a URL that leads to the machine it is used on, without user and password; else nothing."""
    if "://" not in url:
        return ""
    from ipaddress import ip_address  # not for every `up`

    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return ""
    try:
        local = ip_address(host).is_loopback or ip_address(host).is_unspecified
    except ValueError:
        local = host == "localhost" or host.endswith(".localhost")
    return (f"{host}:{port}" if port else host) if local and parts.scheme else ""
