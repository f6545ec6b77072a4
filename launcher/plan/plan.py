"""Decide, before anything starts, what `up` will start: request and inventory in, plan out, nothing touched."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from launcher.devices.devices import Device, join_devices, split_cores
from launcher.devices.holders import NOBODY, Occupancy, choose_gpus
from launcher.devices.inventory import Gpu, Machine
from launcher.engines.base import Mount, ReplicaSpec
from launcher.hosts.runs_folder import check_user
from launcher.options.training_args import TrainingArgs
from launcher.plan.ddp import check_device_argument, check_together
from launcher.problems import Problems
from launcher.sizes import GIB, MIB, format_size
from starling.core.dataset import START
from starling.core.errors import StarlingError, UsageError

DEFAULT_IMAGE = "starling:latest"
RUNS_IN_IMAGE = "/usr/src/app/runs"
TRAINER_IN_IMAGE = ("python", "/usr/src/app/train.py")
SUPERVISOR_IN_IMAGE = ("python", "-S", "/usr/src/app/supervise.py")

SHARE_OF_MEMORY = 0.9
"""Without --memory, replicas share this much of the machine's memory evenly; the rest is the host's."""

PASSED_NAMES = ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN", "STARLING_STUDY_PASSWORD_FILE")
PASSED_PREFIXES = ("CLEARML_", "MLFLOW_TRACKING_")
"""Variables of the caller that trackers and a study's database need; they reach replicas without being asked for."""

_PRIVATE_ENVIRONMENT = {
    "HOME": "/tmp",  # the root file system is read-only and the user has no home in the image
    "MPLCONFIGDIR": "/tmp",
    "USER": "starling",  # the uid has no name in the image, and getpass.getuser() asks this first
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """How an engine places the trainer: the command that starts it, and where it finds the runs folder."""

    engine: str
    trainer: tuple[str, ...]
    runs_inside: str
    isolated: bool
    """Replicas see only what is mounted, and their limits are enforced."""
    supervisor: tuple[str, ...] = ()
    """What stands over the trainer and starts it again when it crashes; empty: nothing does."""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the user asked of `up`, parsed but not yet checked against the machine."""

    args: TrainingArgs
    runs: Path
    gpus: str | None = None
    cpus: int | None = None
    ddp: bool = False
    """One training on all of the devices."""
    force: bool = False
    """Take devices that others hold."""
    recreate: bool = False
    """Start a fleet that exists anew."""
    memory_bytes: int | None = None
    shm_bytes: int | None = None
    image: str = DEFAULT_IMAGE
    network: str = "bridge"
    user: str = ""
    max_restarts: int = 3
    passed: Mapping[str, str] = field(default_factory=dict, repr=False)
    settings: Mapping[str, str] = field(default_factory=dict)
    """Variables for the trainer that are no secret."""
    volumes: tuple[Mount, ...] = ()
    """Beside the paths that the arguments name: the engine's own, and files with secrets."""

    def wants_gpus(self, gpus: Sequence[Gpu] | None) -> bool:
        """Return whether replicas get GPUs: asked for, or there and nothing else asked for."""
        return self.gpus is not None or (self.cpus is None and bool(gpus))


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What one `up` starts."""

    engine: str
    fleet: str
    replicas: tuple[ReplicaSpec, ...]
    notes: tuple[str, ...] = ()
    problems: tuple[StarlingError, ...] = ()
    """What would stop it now; only a plan that is to be shown has any."""

    def public(self) -> dict[str, Any]:
        """Return the plan as plain values without a secret."""
        return {
            "engine": self.engine,
            "fleet": self.fleet,
            "replicas": [spec.public() | {"spec": spec.digest} for spec in self.replicas],
            "notes": list(self.notes),
            "problems": [
                {"message": str(problem), "exit_code": problem.exit_code} for problem in self.problems
            ],
        }


def make_plan(
    request: Request,
    placement: Placement,
    machine: Machine,
    gpus: Sequence[Gpu] | None,
    image_id: str,
    occupancy: Occupancy = NOBODY,
    problems: Problems | None = None,
) -> Plan:
    """Return the plan, or raise UsageError for what cannot work on this machine.

    `gpus` is NVML's list, None where it does not answer; `occupancy` says who holds them. With `problems`, what cannot
    work and can yet be planned is kept there.
    """
    found = Problems() if problems is None else problems
    devices, shares, notes = _choose_devices(request, machine, gpus, occupancy, found)
    found.check(_check_memory, request, machine, len(devices))
    memory = request.memory_bytes or _share_of_memory(machine, len(devices))
    found.check(_check_shm, request.shm_bytes, memory)
    threads = [max(1, len(own or machine.cores) // (1 if own else len(devices))) for own in shares]
    if request.ddp:
        found.check(check_together, request.args, devices)
        notes += ["--ddp: there is one device, so this is a training on one device"] * (len(devices) == 1)
        devices, shares = (join_devices(devices),), (tuple(core for own in shares for core in own),)
    found.check(check_device_argument, request.args.command.config.device, devices[0])
    if not request.args.command.config.evolve and len(devices) > 1:
        notes.append(
            "no --evolve: each replica trains by itself; add --evolve N to search together, or --ddp to train one model"
        )
    if request.user:
        found.check(check_user, request.user)
    if problems is None:
        found.raise_any()
    template = _template(request, placement, image_id, memory)
    return Plan(
        engine=placement.engine,
        fleet=request.args.fleet,
        replicas=tuple(
            _replica(template, device, cores, count)
            for device, cores, count in zip(devices, shares, threads, strict=False)
        ),
        notes=tuple(notes),
    )


def passed_variables(
    environment: Mapping[str, str], names: Sequence[str] = (), from_files: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the user's own variables for replicas: trackers' by themselves, others by name or from files.

    Raises UsageError for a name asked for that is not set.
    """
    passed = {
        name: value
        for name, value in environment.items()
        if name in PASSED_NAMES or name.startswith(PASSED_PREFIXES)
    }
    passed.update(from_files or {})
    for name in names:
        if "=" in name:
            raise UsageError(
                f"--env {name.split('=', 1)[0]}=…: give the name only and set the variable before; "
                "values on a command line can be read by every user of the machine"
            )
        if name not in environment:
            raise UsageError(f"--env {name}: is not set; export it first")
        passed[name] = environment[name]
    return passed


def _choose_devices(
    request: Request,
    machine: Machine,
    gpus: Sequence[Gpu] | None,
    occupancy: Occupancy,
    problems: Problems,
) -> tuple[tuple[Device, ...], tuple[tuple[int, ...], ...], list[str]]:
    """Return the devices, the cores each is pinned to (none for GPU replicas), and notes."""
    if request.gpus is not None and request.cpus is not None:
        raise UsageError("--gpus and --cpu exclude each other; start two fleets to use both")
    if request.wants_gpus(gpus):
        text = request.gpus if request.gpus is not None else "all"
        devices, shared = choose_gpus(text, gpus, occupancy, force=request.force, problems=problems)
        return devices, ((),) * len(devices), list(shared)
    notes = [] if request.cpus is not None else ["no GPU found here: one CPU replica; say --gpus or --cpu N"]
    shares = split_cores(machine.cores, 1 if request.cpus is None else request.cpus)
    return tuple(Device("cpu", str(number)) for number in range(len(shares))), shares, notes


def _share_of_memory(machine: Machine, replicas: int) -> int:
    share = int(machine.memory_bytes * SHARE_OF_MEMORY / replicas)
    return share - share % (64 * MIB)  # a round figure stays the same from one call to the next


def _check_memory(request: Request, machine: Machine, replicas: int) -> None:
    if request.memory_bytes is None:
        return
    total = request.memory_bytes * replicas
    what = ("device" if request.ddp else "replica") + "s" * (replicas != 1)
    if total > machine.memory_bytes:
        each = int(machine.memory_bytes * SHARE_OF_MEMORY / replicas) // MIB
        raise UsageError(
            f"--memory {format_size(request.memory_bytes)}: {replicas} {what} need{'s' * (replicas == 1)} "
            f"{format_size(total)} and this machine has {format_size(machine.memory_bytes)}; use at most --memory {each}m"
            + f", or fewer {what}"
            * (replicas != 1)
        )


def _check_shm(shm: int | None, memory: int) -> None:
    """Refuse a /dev/shm that could never be filled; within the memory of each, the sum fits where that of memory does."""
    if shm is not None and shm > memory:
        raise UsageError(
            f"--shm {format_size(shm)}: what a replica keeps there counts against --memory, {format_size(memory)} here; "
            "give less, or more memory"
        )


def _template(request: Request, placement: Placement, image_id: str, memory: int) -> ReplicaSpec:
    """Return what all replicas have in common; `memory` and what follows from it are a device's share."""
    runs = Mount(source=str(request.runs), target=placement.runs_inside, read_only=False)
    return ReplicaSpec(
        name="",
        fleet=request.args.fleet,
        device=Device("cpu", "0"),
        image=request.image if placement.isolated else "",
        image_id=image_id,
        command=(*_supervision(request, placement), *placement.trainer, *request.args.words),
        environment={
            "PYTHONUNBUFFERED": "1",
            "STARLING_FLEET": request.args.fleet,
            "STARLING_RUNS": placement.runs_inside,
            **({**_PRIVATE_ENVIRONMENT, "STARLING_IMAGE": image_id} if placement.isolated else {}),
            **placement.environment,
            **({START: str(request.args.start)} if request.args.start else {}),
            **request.settings,
        },
        passed=request.passed,
        mounts=(runs, *request.args.mounts, *request.volumes) if placement.isolated else (),
        runs=request.runs,
        user=request.user if placement.isolated else "",
        memory_bytes=memory,
        shm_bytes=request.shm_bytes or min(GIB, memory // 4),
        tmp_bytes=min(GIB, memory // 4),
        network=request.network if placement.isolated else "",
    )


def _supervision(request: Request, placement: Placement) -> tuple[str, ...]:
    if not placement.supervisor:
        return ()
    return (*placement.supervisor, "--max-restarts", str(request.max_restarts), "--")


def _replica(template: ReplicaSpec, device: Device, cores: tuple[int, ...], threads: int) -> ReplicaSpec:
    """Return one device's replica, or the one of several devices, which gets the sum of their shares."""
    name = replica_name(template.fleet, device)
    count = len(device.members)
    command = template.command
    if device.kind == "gpu":
        pinned = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        if not template.image:
            pinned["CUDA_VISIBLE_DEVICES"] = ",".join(device.handles)
    else:
        # An image's own NVIDIA_VISIBLE_DEVICES=all must not give GPUs to a CPU replica.
        pinned = {"NVIDIA_VISIBLE_DEVICES": "void"} if template.image else {"CUDA_VISIBLE_DEVICES": ""}
    named = any(word.split("=", 1)[0].startswith("--dev") for word in command)
    if not named and (device.kind == "cpu" or count > 1):
        command = (*command, "--device", device.inside)
    environment = {
        **template.environment,
        **pinned,
        "STARLING_REPLICA": name,
        "OMP_NUM_THREADS": str(threads),
    }
    return replace(
        template,
        name=name,
        device=device,
        cores=cores,
        command=command,
        environment=environment,
        memory_bytes=template.memory_bytes * count,
        shm_bytes=template.shm_bytes * count,
        tmp_bytes=template.tmp_bytes * count,
        pids_limit=template.pids_limit * count,
    )


def replica_name(fleet: str, device: Device) -> str:
    """Return a container's name: the fleet in the letters that names may have, and the device."""
    project, name = PurePosixPath(fleet).parent.as_posix(), PurePosixPath(fleet).name
    words = [re.sub(r"[^A-Za-z0-9_.]+", "-", part).strip("-._") or "run" for part in (project, name)]
    return "-".join([*words, device.slug])[-120:].lstrip("-._")
