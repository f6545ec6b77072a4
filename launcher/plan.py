"""Decide, before anything starts, what `up` will start: request and inventory in, plan out, nothing touched."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from launcher.devices import Device, resolve_gpus, split_cores
from launcher.engines.base import Mount, ReplicaSpec, ReplicaState
from launcher.errors import UsageError
from launcher.inventory import Gpu, Machine
from launcher.sizes import GIB, MIB, format_size
from launcher.training_args import TrainingArgs

DEFAULT_IMAGE = "starling:latest"
RUNS_IN_IMAGE = "/usr/src/app/runs"
TRAINER_IN_IMAGE = ("python", "/usr/src/app/train.py")

SHARE_OF_MEMORY = 0.9
"""Without --memory, replicas share this much of the machine's memory evenly; the rest is the host's."""

PASSWORD_FILE = "STARLING_STUDY_PASSWORD_FILE"
PASSED_NAMES = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN", PASSWORD_FILE)
PASSED_PREFIX = "CLEARML_"
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
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the user asked of `up`, parsed but not yet checked against the machine."""

    args: TrainingArgs
    runs: Path
    gpus: str | None = None
    cpus: int | None = None
    memory_bytes: int | None = None
    shm_bytes: int | None = None
    image: str = DEFAULT_IMAGE
    network: str = "bridge"
    user: str = ""
    passed: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What one `up` starts."""

    engine: str
    fleet: str
    replicas: tuple[ReplicaSpec, ...]
    notes: tuple[str, ...] = ()

    def public(self) -> dict[str, Any]:
        """Return the plan as plain values without a secret."""
        return {
            "engine": self.engine,
            "fleet": self.fleet,
            "replicas": [spec.public() | {"spec": spec.digest} for spec in self.replicas],
            "notes": list(self.notes),
        }


def make_plan(
    request: Request,
    placement: Placement,
    machine: Machine,
    gpus: Sequence[Gpu] | None,
    image_id: str,
    others: Sequence[ReplicaState] = (),
) -> Plan:
    """Return the plan, or raise UsageError for what cannot work on this machine.

    `gpus` is NVML's list, None where it does not answer; `others` are the replicas of other fleets.
    """
    devices, shares, notes = _choose_devices(request, machine, gpus)
    _check_free(devices, others)
    _check_device_argument(request.args.device, devices[0].kind)
    memory = _memory(request, machine, len(devices))
    if not placement.isolated and request.memory_bytes:
        notes.append("the local engine does not enforce --memory; the Docker engine does")
    if not request.args.evolve and len(devices) > 1:
        notes.append("no --evolve: each replica trains by itself; add --evolve N to search together")
    if request.user.startswith("0:"):
        notes.append(
            "replicas run as root without capabilities; chown the runs folder, or give --user UID:GID, for another user"
        )
    template = _template(request, placement, image_id, memory)
    return Plan(
        engine=placement.engine,
        fleet=request.args.fleet,
        replicas=tuple(
            _replica(
                template, device, cores, max(1, len(cores or machine.cores) // (1 if cores else len(devices)))
            )
            for device, cores in zip(devices, shares, strict=True)
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
        if name in PASSED_NAMES or name.startswith(PASSED_PREFIX)
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
    request: Request, machine: Machine, gpus: Sequence[Gpu] | None
) -> tuple[tuple[Device, ...], tuple[tuple[int, ...], ...], list[str]]:
    """Return the devices, the cores each is pinned to (none for GPU replicas), and notes."""
    if request.gpus is not None and request.cpus is not None:
        raise UsageError("--gpus and --cpu exclude each other; start two fleets to use both")
    if request.cpus is None and (request.gpus is not None or gpus):
        devices = resolve_gpus(request.gpus if request.gpus is not None else "all", gpus)
        return devices, ((),) * len(devices), []
    notes = [] if request.cpus is not None else ["no GPU found here: one CPU replica; say --gpus or --cpu N"]
    shares = split_cores(machine.cores, 1 if request.cpus is None else request.cpus)
    return tuple(Device("cpu", str(number)) for number in range(len(shares))), shares, notes


def _check_free(devices: Sequence[Device], others: Sequence[ReplicaState]) -> None:
    for device in devices:
        for other in others:
            if (
                device.kind == "gpu"
                and other.device == device.label
                and (other.live or other.phase == "created")
            ):
                raise UsageError(
                    f"--gpus: GPU {device.id} is held by {other.name} of fleet {other.fleet}; "
                    f"choose another, or stop that fleet: launcher stop {other.fleet}"
                )


def _check_device_argument(asked: str | None, kind: str) -> None:
    """Refuse a training `--device` that the replica does not have: inside, a GPU is always device 0."""
    allowed = ("cpu",) if kind == "cpu" else ("", "0", "cuda:0")
    if asked is not None and asked not in allowed:
        raise UsageError(
            f"--device {asked}: each replica has one device of its own and finds it by itself; leave --device out "
            "and choose devices with `launcher up --gpus` or `--cpu`"
        )


def _memory(request: Request, machine: Machine, replicas: int) -> int:
    if request.memory_bytes is None:
        share = int(machine.memory_bytes * SHARE_OF_MEMORY / replicas)
        return share - share % (64 * MIB)  # a round figure stays the same from one call to the next
    total = request.memory_bytes * replicas
    if total > machine.memory_bytes:
        each = int(machine.memory_bytes * SHARE_OF_MEMORY / replicas) // MIB
        raise UsageError(
            f"--memory {format_size(request.memory_bytes)}: {replicas} replicas need {format_size(total)} and this "
            f"machine has {format_size(machine.memory_bytes)}; use at most --memory {each}m, or fewer replicas"
        )
    return request.memory_bytes


def _template(request: Request, placement: Placement, image_id: str, memory: int) -> ReplicaSpec:
    """Return what all replicas have in common."""
    runs = Mount(source=str(request.runs), target=placement.runs_inside, read_only=False)
    return ReplicaSpec(
        name="",
        fleet=request.args.fleet,
        device=Device("cpu", "0"),
        image=request.image if placement.isolated else "",
        image_id=image_id,
        command=(*placement.trainer, *request.args.words),
        environment={
            "PYTHONUNBUFFERED": "1",
            "STARLING_FLEET": request.args.fleet,
            "STARLING_RUNS": placement.runs_inside,
            **({**_PRIVATE_ENVIRONMENT, "STARLING_IMAGE": image_id} if placement.isolated else {}),
            **placement.environment,
        },
        passed=request.passed,
        mounts=(runs, *request.args.mounts, *_password_mounts(request.passed)) if placement.isolated else (),
        runs=request.runs,
        user=request.user if placement.isolated else "",
        memory_bytes=memory,
        shm_bytes=request.shm_bytes or min(GIB, memory // 4),
        tmp_bytes=min(GIB, memory // 4),
        network=request.network if placement.isolated else "",
    )


def _password_mounts(passed: Mapping[str, str]) -> tuple[Mount, ...]:
    """Return the mount of the file that holds the password of the study's database, at its own path."""
    named = passed.get(PASSWORD_FILE)
    if not named:
        return ()
    path = PurePosixPath(named)
    if not path.is_absolute() or not Path(path).is_file():
        raise UsageError(f"{PASSWORD_FILE}={named}: must be the absolute path of a file; correct or unset it")
    return (Mount(source=named, target=named),)


def _replica(template: ReplicaSpec, device: Device, cores: tuple[int, ...], threads: int) -> ReplicaSpec:
    name = replica_name(template.fleet, device)
    command = template.command
    if device.kind == "gpu":
        pinned = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        if not template.image:
            pinned["CUDA_VISIBLE_DEVICES"] = device.id
    else:
        # An image's own NVIDIA_VISIBLE_DEVICES=all must not give GPUs to a CPU replica.
        pinned = {"NVIDIA_VISIBLE_DEVICES": "void"} if template.image else {"CUDA_VISIBLE_DEVICES": ""}
        if not any(word.split("=", 1)[0].startswith("--dev") for word in command):
            command = (*command, "--device", "cpu")
    environment = {
        **template.environment,
        **pinned,
        "STARLING_REPLICA": name,
        "OMP_NUM_THREADS": str(threads),
    }
    return replace(template, name=name, device=device, cores=cores, command=command, environment=environment)


def replica_name(fleet: str, device: Device) -> str:
    """Return a container's name: the fleet in the letters that names may have, and the device."""
    project, name = PurePosixPath(fleet).parent.as_posix(), PurePosixPath(fleet).name
    words = [re.sub(r"[^A-Za-z0-9_.]+", "-", part).strip("-._") or "run" for part in (project, name)]
    return "-".join([*words, device.slug])[-120:].lstrip("-._")
