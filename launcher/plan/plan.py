"""Decide what `up` starts: turn a request and facts into a plan, without side effects."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from launcher.devices.devices import Device, join_devices, replica_gpus, split_cores
from launcher.devices.holders import NO_DEVICE, GpuChoice, Occupancy, choose_gpus
from launcher.devices.inventory import Machine
from launcher.engines.base import Mount, ReplicaSpec, ReplicaState
from launcher.options.request import Request
from launcher.plan.changes import NO_CHANGES, Changes, plan_changes
from launcher.plan.facts import Facts
from starling.core.dataset import START
from starling.core.errors import UsageError
from starling.core.units import GIB, MIB, format_size

SHARE_OF_MEMORY = 0.9
"""Without --memory, replicas share this part of the machine's memory evenly; the rest is left to the host."""

CLEARML_FILE = "CLEARML_CONFIG_FILE"
"""The variable that names the file with ClearML's keys, which `clearml-init` writes."""

_PRIVATE_ENVIRONMENT = {
    "HOME": "/tmp",  # the root file system is read-only and the user has no home in the image
    "MPLCONFIGDIR": "/tmp",
    "USER": "starling",  # the uid has no name in the image, and getpass.getuser() asks this first
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What one `up` starts, and what it does with the existing replicas."""

    request: Request
    """The request, with the variables and mounts of secret files filled in."""
    engine: str
    choice: GpuChoice = NO_DEVICE
    """The devices, before --ddp joins them, and their other holders."""
    replicas: tuple[ReplicaSpec, ...] = ()
    changes: Changes = NO_CHANGES
    notes: tuple[str, ...] = ()
    """Remarks for the user that stop nothing."""
    refusal: UsageError | None = None
    """Why no device could be chosen; the plan then has no replicas."""

    @property
    def fleet(self) -> str:
        """`project/name`."""
        return self.request.args.fleet


def make_plan(request: Request, facts: Facts) -> Plan:
    """Return the plan; `check` reports its problems."""
    request = _with_secrets(request, facts)
    try:
        choice, shares, notes = _choose_devices(request, facts)
    except UsageError as refusal:
        return Plan(request=request, engine=facts.engine, refusal=refusal)
    devices = choice.devices
    memory = device_memory(request, facts.machine, len(devices))
    threads = [max(1, len(own or facts.machine.cores) // (1 if own else len(devices))) for own in shares]
    if request.ddp:
        notes += ["--ddp: there is one device, so this is a training on one device"] * (len(devices) == 1)
        devices, shares = (join_devices(devices),), (tuple(core for own in shares for core in own),)
    if not request.args.command.config.evolve and len(devices) > 1:
        notes.append(
            "no --evolve: each replica trains its own model; add --evolve N to search together, or --ddp to train one model"
        )
    template = _template(request, facts, memory)
    replicas = tuple(
        _replica(template, device, cores, count)
        for device, cores, count in zip(devices, shares, threads, strict=False)
    )
    return Plan(
        request=request,
        engine=facts.engine,
        choice=choice,
        replicas=replicas,
        changes=plan_changes(replicas, facts.existing, recreate=request.recreate),
        notes=(*notes, *_notes(request, replicas, facts)),
    )


def occupancy(request: Request, facts: Facts) -> Occupancy:
    """Return the GPUs that others hold, and the GPUs of the fleet's own replicas."""
    settled = [state for state in facts.existing if state.live or (state.finished and not request.recreate)]
    return Occupancy(facts.holders, own=_gpus_of(facts.existing), settled=_gpus_of(settled))


def device_memory(request: Request, machine: Machine, devices: int) -> int:
    """Return the bytes of memory for each device: --memory, else an even share of the machine's."""
    share = int(machine.memory_bytes * SHARE_OF_MEMORY / devices)
    # Rounding keeps the share the same if the machine's memory differs slightly at the next call.
    return request.memory_bytes or share - share % (64 * MIB)


def _gpus_of(states: Sequence[ReplicaState]) -> tuple[str, ...]:
    return tuple(gpu for state in states for gpu in replica_gpus(state.device, state.plan))


def _with_secrets(request: Request, facts: Facts) -> Request:
    """Return the request with mounts for the files that its variables name, for replicas that see only mounted paths.

    A missing ClearML file keeps its variable without a mount: inside, as here, it means no configuration.
    """
    there = [secret for secret in facts.secrets if secret.is_file]
    passed, settings = dict(request.passed), dict(request.settings)
    for secret in there:
        if secret.variable == CLEARML_FILE:
            settings[CLEARML_FILE] = str(secret.path)  # an absolute path, not secret
            del passed[CLEARML_FILE]
    paths = dict.fromkeys(str(secret.path) for secret in there)
    mounts = tuple(Mount(source=path, target=path) for path in paths)
    return replace(request, passed=passed, settings=settings, volumes=(*request.volumes, *mounts))


def _choose_devices(
    request: Request, facts: Facts
) -> tuple[GpuChoice, tuple[tuple[int, ...], ...], list[str]]:
    """Return the devices, the cores that each is pinned to (empty for GPU replicas), and notes."""
    if request.gpus is not None and request.cpus is not None:
        raise UsageError("--gpus and --cpu exclude each other; start two fleets to use both")
    if request.wants_gpus(facts.gpus):
        choice = choose_gpus(gpu_words(request), facts.gpus, occupancy(request, facts))
        return choice, ((),) * len(choice.devices), choice.shared_notes() if request.force else []
    notes = [] if request.cpus is not None else ["no GPU found here: one CPU replica; say --gpus or --cpu N"]
    shares = split_cores(facts.machine.cores, 1 if request.cpus is None else request.cpus)
    return GpuChoice(tuple(Device("cpu", str(number)) for number in range(len(shares)))), shares, notes


def gpu_words(request: Request) -> str:
    """Return the value of `--gpus`, or `all` without it."""
    return request.gpus if request.gpus is not None else "all"


def _template(request: Request, facts: Facts, memory: int) -> ReplicaSpec:
    """Return the spec that all replicas share; `memory`, and the sizes derived from it, are one device's."""
    entrypoint = request.entrypoint
    isolated, image_id = entrypoint.isolated, facts.image.id if facts.image else ""
    runs = Mount(source=str(request.runs), target=entrypoint.runs_inside, read_only=False)
    return ReplicaSpec(
        name="",
        fleet=request.args.fleet,
        device=Device("cpu", "0"),
        image=request.image if isolated else "",
        image_id=image_id,
        command=(*_supervision(request), *entrypoint.trainer, *request.args.words),
        environment={
            "PYTHONUNBUFFERED": "1",
            "STARLING_FLEET": request.args.fleet,
            "STARLING_RUNS": entrypoint.runs_inside,
            **({**_PRIVATE_ENVIRONMENT, "STARLING_IMAGE": image_id} if isolated else {}),
            **entrypoint.environment,
            **({START: str(request.args.start)} if request.args.start else {}),
            **request.settings,
        },
        passed=request.passed,
        mounts=(runs, *request.args.mounts, *request.volumes) if isolated else (),
        runs=request.runs,
        user=request.user if isolated else "",
        memory_bytes=memory,
        shm_bytes=request.shm_bytes or min(GIB, memory // 4),
        tmp_bytes=min(GIB, memory // 4),
        network=request.network if isolated else "",
    )


def _supervision(request: Request) -> tuple[str, ...]:
    supervisor = request.entrypoint.supervisor
    return (*supervisor, "--max-restarts", str(request.max_restarts), "--") if supervisor else ()


def _replica(template: ReplicaSpec, device: Device, cores: tuple[int, ...], threads: int) -> ReplicaSpec:
    """Return the replica of a device; a device of several gets the sum of their shares."""
    name = replica_name(template.fleet, device)
    count = len(device.members)
    command = template.command
    named = any(word.split("=", 1)[0].startswith("--dev") for word in command)
    if not named and (device.kind == "cpu" or count > 1):
        command = (*command, "--device", device.inside)
    return replace(
        template,
        name=name,
        device=device,
        cores=cores,
        command=command,
        environment={
            **template.environment,
            **_visible_devices(device, isolated=bool(template.image)),
            "STARLING_REPLICA": name,
            "OMP_NUM_THREADS": str(threads),
        },
        memory_bytes=template.memory_bytes * count,
        shm_bytes=template.shm_bytes * count,
        tmp_bytes=template.tmp_bytes * count,
        pids_limit=template.pids_limit * count,
    )


def _visible_devices(device: Device, *, isolated: bool) -> dict[str, str]:
    """Return the variables that limit a replica to its own GPUs."""
    if device.kind == "gpu":
        own = {} if isolated else {"CUDA_VISIBLE_DEVICES": ",".join(device.handles)}
        return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **own}
    # NVIDIA_VISIBLE_DEVICES=all in the image must not give GPUs to a CPU replica.
    return {"NVIDIA_VISIBLE_DEVICES": "void"} if isolated else {"CUDA_VISIBLE_DEVICES": ""}


def replica_name(fleet: str, device: Device) -> str:
    """Return a container's name: the fleet in the characters that names may have, and the device."""
    project, name = PurePosixPath(fleet).parent.as_posix(), PurePosixPath(fleet).name
    words = [re.sub(r"[^A-Za-z0-9_.]+", "-", part).strip("-._") or "run" for part in (project, name)]
    return "-".join([*words, device.slug])[-120:].lstrip("-._")


def _notes(request: Request, replicas: Sequence[ReplicaSpec], facts: Facts) -> list[str]:
    """Return notes on trackers and memory."""
    notes = []
    if request.entrypoint.isolated:
        notes += _unreachable_trackers(request.passed, request.network)
        if CLEARML_FILE in request.passed:
            notes.append(
                f"{CLEARML_FILE}={request.passed[CLEARML_FILE]}: no such file; without CLEARML_API_ACCESS_KEY and "
                "CLEARML_API_SECRET_KEY nothing is sent to ClearML"
            )
    taken = sum(other.memory_bytes for other in facts.others if other.live)
    wanted = sum(spec.memory_bytes for spec in replicas)
    has = facts.machine.memory_bytes
    if taken and taken + wanted > has:
        notes.append(
            f"memory: fleets that run here may take {format_size(taken)}, this one {format_size(wanted)}, and the machine "
            f"has {format_size(has)}; lower --memory, or end the others, to be safe from the kernel's killer"
        )
    return notes


def _unreachable_trackers(passed: Mapping[str, str], network: str) -> list[str]:
    """Return a note for each server in the user's variables that cannot be reached inside a container."""
    if network == "host":
        return []
    return [
        f"{name}: {where} is the replica itself, not this machine, on network {network}: nothing will arrive there. For "
        "the servers of `launcher track up` say --tracking and leave the variable out; or name an address that containers reach"
        for name, value in sorted(passed.items())
        if (where := loopback(value))
    ]


def loopback(url: str) -> str:
    """Return `host:port` of a loopback URL, without user and password; empty for any other URL."""
    if "://" not in url:
        return ""
    from ipaddress import ip_address  # not needed by every `up`

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
