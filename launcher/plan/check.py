"""Check a plan before anything starts; each problem names its remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.devices.devices import Device
from launcher.devices.inventory import Driver, Machine
from launcher.engines.base import Image, ReplicaSpec, ReplicaState
from launcher.errors import EngineError
from launcher.hosts.files import DiskSpace
from launcher.hosts.runs_folder import check_user
from launcher.options.request import Request
from launcher.options.training_args import TrainingArgs
from launcher.plan.access import check_data, check_runs_access, check_secret_file
from launcher.plan.changes import differences
from launcher.plan.facts import Access, Facts
from launcher.plan.plan import (
    CLEARML_FILE,
    SHARE_OF_MEMORY,
    Plan,
    device_memory,
    gpu_words,
    loopback,
    occupancy,
)
from launcher.problems import Problems
from starling.core.errors import StarlingError, UsageError
from starling.core.units import GIB, MIB, format_size

LEAST_FREE_BYTES = GIB
"""Too little for a search: a run of the smallest model takes some 50 MB, of the largest over 1 GB."""
LEAST_FREE_FILES = 1000

DRIVER_FOR_CUDA = {11: "450", 12: "525", 13: "580"}
"""The first driver branch that runs every release of a CUDA major version (NVIDIA's minor-version compatibility)."""


def check(plan: Plan, facts: Facts) -> tuple[StarlingError, ...]:
    """Return all problems that would stop the plan; empty if there are none."""
    problems = Problems()
    problems.check(_check_secrets, facts)
    if not plan.request.build:
        problems.add(facts.refusals.image)
    problems.add(plan.refusal)
    if plan.refusal is None:
        _check_devices(plan, facts, problems)
    _check_engine(facts, problems)
    _check_paths(plan, facts, problems)
    problems.add(facts.refusals.names)
    # Without the image's id, the existing fleet cannot be compared with the requested one.
    if plan.replicas and not (facts.refusals.names or facts.image is None or plan.request.recreate):
        problems.check(check_fleet, plan.replicas, facts.existing, facts.environments)
    return tuple(problems.found)


def _check_devices(plan: Plan, facts: Facts, problems: Problems) -> None:
    """Check the devices, and the memory and options for each."""
    request, count = plan.request, len(plan.choice.devices)
    if not request.force:
        problems.check(plan.choice.check_free, gpu_words(request), facts.gpus, occupancy(request, facts))
    problems.check(check_memory, request, facts.machine, count)
    problems.check(check_shm, request.shm_bytes, device_memory(request, facts.machine, count))
    if request.ddp:
        problems.check(check_together, request.args, plan.choice.devices)
    problems.check(check_device_argument, request.args.command.config.device, plan.replicas[0].device)
    if request.user:
        problems.check(check_user, request.user)


def _check_engine(facts: Facts, problems: Problems) -> None:
    """Check the engine's network, trainer, GPU runtime and driver."""
    problems.add(facts.refusals.network)
    problems.add(facts.refusals.trainer)
    problems.add(facts.refusals.gpu_runtime)
    if facts.image is not None:
        problems.check(check_driver, facts.image, facts.driver)


def _check_paths(plan: Plan, facts: Facts, problems: Problems) -> None:
    """Check the disk, the study's address, and the permissions of the paths."""
    request = plan.request
    if facts.disk is not None:
        problems.check(check_disk, request.runs, facts.disk)
    if request.entrypoint.isolated:
        problems.check(check_study_address, request.args.command.config.study, request.network)
    if facts.access is not None:
        _check_access(request, facts, facts.access, problems)


def _check_access(request: Request, facts: Facts, access: Access, problems: Problems) -> None:
    problems.check(check_runs_access, request.runs, access.runs, request.user, facts.uid)
    shown = [Path(mount.source) for mount in request.args.mounts]
    problems.check(check_data, access.reads, shown, request.user)
    for secret in facts.secrets:
        if secret.state is not None:
            problems.check(check_secret_file, secret.state, secret.variable, request.user)


def _check_secrets(facts: Facts) -> None:
    """Raise UsageError for a missing password file; a missing ClearML file is only a note."""
    for secret in facts.secrets:
        if not secret.is_file and secret.variable != CLEARML_FILE:
            where = " on the remote machine" if facts.behind_ssh else ""
            raise UsageError(
                f"{secret.variable}={secret.path}: must be the absolute path of a file{where}; correct or unset it"
            )


def check_fleet(
    specs: Sequence[ReplicaSpec],
    existing: Sequence[ReplicaState],
    environments: Mapping[str, Mapping[str, str]],
) -> None:
    """Raise UsageError with the differences if the existing fleet differs from `specs`."""
    changed = differences(specs, existing, environments)
    if changed:
        raise UsageError(
            f"fleet {specs[0].fleet} exists and differs:\n  " + "\n  ".join(changed) + "\n"
            "give --recreate to stop it (checkpoints are saved) and start it like this"
        )


def check_memory(request: Request, machine: Machine, devices: int) -> None:
    """Raise UsageError if the replicas together may use more memory than the machine has."""
    if request.memory_bytes is None or request.memory_bytes * devices <= machine.memory_bytes:
        return
    several = devices != 1
    what = ("device" if request.ddp else "replica") + "s" * several
    most = int(machine.memory_bytes * SHARE_OF_MEMORY / devices) // MIB
    raise UsageError(
        f"--memory {format_size(request.memory_bytes)}: {devices} {what} need{'s' * (not several)} "
        f"{format_size(request.memory_bytes * devices)} and this machine has {format_size(machine.memory_bytes)}; "
        f"use at most --memory {most}m" + f", or fewer {what}" * several
    )


def check_shm(shm: int | None, memory: int) -> None:
    """Raise UsageError if /dev/shm is larger than `memory`, against which it counts; `check_memory` checks the sum."""
    if shm is not None and shm > memory:
        raise UsageError(
            f"--shm {format_size(shm)}: what a replica keeps there counts against --memory, {format_size(memory)} here; "
            "give less, or more memory"
        )


def check_together(args: TrainingArgs, devices: Sequence[Device]) -> None:
    """Raise UsageError if the devices or the training do not allow one training on all devices."""
    config = args.command.config
    if config.evolve:
        raise UsageError(
            "--ddp: a search trains different candidates on each device, which finishes more of them in the same time; "
            "leave out --ddp, or --evolve"
        )
    sliced = [item for device in devices for item in device.handles if ":" in item or item.startswith("MIG-")]
    if sliced and len(devices) > 1:
        raise UsageError(
            f"--ddp: {', '.join(device.id for device in devices)}: CUDA gives a program one MIG slice and no more; "
            "name whole GPUs, or leave out --ddp"
        )
    # A resumed training takes its batch from the checkpoint, which the host does not read.
    if len(devices) > 1 and ("batch_size" in args.command.given or not config.resume):
        config.check_split(len(devices))


def check_device_argument(asked: str, device: Device) -> None:
    """Raise UsageError for a `--device` that the replica does not have: inside, GPUs count from 0."""
    several = len(device.members) > 1
    allowed = (device.inside,) if several or device.kind == "cpu" else ("0", "cuda:0")
    if asked and asked not in allowed:
        raise UsageError(
            f"--device {asked}: each replica finds its own {'devices' if several else 'device'} automatically; leave "
            "--device out and choose devices with `launcher up --gpus` or `--cpu`"
            + ("" if several or "," not in asked else ", and --ddp for one training on several")
        )


def check_driver(image: Image, driver: Driver | None) -> None:
    """Raise EngineError if the driver is older than the CUDA in the image; accepts unknown versions."""
    major = (image.cuda or "").split(".")[0]
    if driver is None or not major.isdigit() or driver.cuda[0] >= int(major):
        return
    branch = DRIVER_FOR_CUDA.get(int(major))
    needed = f"driver {branch} or newer" if branch else f"a driver for CUDA {major}"
    raise EngineError(
        f"image {image.name} holds CUDA {image.cuda} and this machine's NVIDIA driver {driver.version} serves CUDA "
        f"{driver.cuda[0]}.{driver.cuda[1]} at most; install {needed}, or use an image built for CUDA {driver.cuda[0]}"
    )


def check_disk(runs: Path, space: DiskSpace) -> None:
    """Raise UsageError if the disk of the runs folder is nearly full, in bytes or in files."""
    if space.bytes < LEAST_FREE_BYTES:
        raise UsageError(
            f"--runs {runs}: {format_size(space.bytes)} free on its disk, and checkpoints need at least "
            f"{format_size(LEAST_FREE_BYTES)}; make room, or give a folder on another disk"
        )
    if space.files is not None and space.files < LEAST_FREE_FILES:
        raise UsageError(
            f"--runs {runs}: its disk takes only {space.files} more files; remove some, or give a folder on another disk"
        )


def check_study_address(study: str, network: str) -> None:
    """Raise UsageError if the address of the study's database means the container itself."""
    where = loopback(study)
    if where and network != "host":
        raise UsageError(
            f"--study: {where} is the replica itself, not this machine, on network {network}; name the database by an "
            "address that containers reach, join its network with --network, or use --network host"
        )
