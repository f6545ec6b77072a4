"""Find who holds this machine's GPUs: replicas of any fleet and user, other containers, processes of neither."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.devices.devices import expand_ids
from launcher.devices.holders import Claim, Occupancy
from launcher.devices.inventory import Gpu, GpuProcess, MigSlice
from launcher.engines.base import Engine, ReplicaState
from launcher.engines.labels import DEVICE_LABEL, FLEET_LABEL, REPLICA_LABEL, plan_of
from launcher.errors import EngineError
from launcher.hosts.address import engine_address, socket_path
from launcher.hosts.processes import PROC, Process, command_words, find_process, user_id, user_name
from launcher.hosts.this_machine import ThisMachine
from launcher.sizes import format_size
from launcher.status.progress import read_json
from starling.core.words import printable

_SUPERVISOR = re.compile(r"(^|/)launcher/engines/(local/)?supervisor\.py$")
"""Its path on a command line, of this version and of those before it."""


def find_occupancy(
    engine: Engine,
    gpus: Sequence[Gpu] | None,
    own: Sequence[ReplicaState],
    caller: int,
    *,
    recreate: bool = False,
    proc: Path = PROC,
) -> Occupancy:
    """Return what others hold, and what `own`, the replicas of the fleet in question, have.

    Asked are the engine's containers or replicas; where the engine is this machine's, also the local replicas of all
    its users, Docker's containers beside the local engine, and the processes that compute on `gpus`.
    """
    claims = list(engine.claims())
    if not engine.host.remote:
        supervised = local_replicas(proc)
        claims += supervised.values()
        if engine.name == "local":
            claims += _containers(caller)
        claims += _process_claims(gpus or (), claims, supervised, proc)
    ours = {state.id for state in own}
    settled = [state for state in own if state.live or (state.finished and not recreate)]
    return Occupancy(
        claims=tuple(dict.fromkeys(claim for claim in claims if claim.id not in ours)),
        own=_devices_of(own),
        settled=_devices_of(settled),
    )


def _devices_of(states: Sequence[ReplicaState]) -> tuple[str, ...]:
    return tuple(item for state in states for item in device_ids(state.device, state.plan))


def device_ids(label: str, plan: Mapping[str, object]) -> tuple[str, ...]:
    """Return a replica's GPUs: the UUIDs of its plan, or else the ids of its label; none for a CPU replica."""
    kind, _, text = label.partition(":")
    uuids = plan.get("uuids")
    if kind != "gpu":
        return ()
    return tuple(map(str, uuids)) if isinstance(uuids, list) and uuids else expand_ids(text)


def local_replicas(proc: Path = PROC) -> dict[int, Claim]:
    """Return what the local engine's replicas hold, by the pid of their supervisor: every user's, in any runs folder."""
    claims = {}
    for folder in proc.iterdir():
        if folder.name.isdecimal() and (claim := _supervised(folder)):
            claims[int(folder.name)] = claim
    return claims


def _supervised(folder: Path) -> Claim | None:
    """Return the claim of a supervisor's replica; what it holds is known where its record can be read."""
    words = command_words(folder)
    places = [at for at, word in enumerate(words[:4]) if _SUPERVISOR.search(word)]
    if not places or len(words) <= places[0] + 1 or "python" not in Path(words[0]).name:
        return None
    exit_file = Path(words[places[0] + 1])
    name = printable(exit_file.name.removesuffix(".exit.json"))
    uid = user_id(folder)
    if uid is None:
        return None
    of_whom = "" if uid == os.getuid() else f" of {user_name(uid)}"
    record = read_json(exit_file.with_name(f"{name}.json"))
    labels, plan = _labels_and_plan(record)
    if plan is None or labels.get(REPLICA_LABEL) != name:
        return Claim(f"local replica {name}{of_whom} (process {folder.name})", (), f"pid {folder.name}")
    fleet = printable(labels.get(FLEET_LABEL, ""))
    command = ["launcher", "stop", "--engine", "local", "--runs", str(exit_file.parent.parent), fleet]
    return Claim(
        holder=f"{name} of fleet {fleet}{of_whom}",
        ids=device_ids(labels.get(DEVICE_LABEL, ""), plan),
        id=str(record.get("id")),
        remedy="" if of_whom else printable(shlex.join(command)),
    )


def _labels_and_plan(record: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any] | None]:
    """Return what a record says; no plan unless it is whole, as somebody else's file may hold anything."""
    found = record.get("labels")
    labels = (
        {key: text for key, text in found.items() if isinstance(text, str)} if isinstance(found, dict) else {}
    )
    try:
        return labels, plan_of(labels)
    except ValueError:  # text that cannot be encoded
        return labels, None


def _containers(caller: int) -> Sequence[Claim]:
    """Return what Docker's containers hold, where there is a Docker beside the local engine that answers."""
    try:
        socket = socket_path(engine_address())
    except EngineError:
        return []
    if socket is None or not Path(socket).exists():
        return []
    from launcher.engines.docker.docker import DockerEngine

    try:
        return DockerEngine(caller, ThisMachine()).claims()
    except EngineError:
        return []


def _process_claims(
    gpus: Sequence[Gpu], claims: Sequence[Claim], supervised: Mapping[int, Claim], proc: Path
) -> Iterator[Claim]:
    """Yield a claim for each process on a GPU, under the name of the container or replica that it belongs to."""
    containers = {claim.id: claim for claim in claims if claim.id}
    for gpu in gpus:
        parts: tuple[Gpu | MigSlice, ...] = (gpu, *gpu.slices)
        for part in parts:
            for running in part.processes:
                process = find_process(running.pid, proc)
                known = process and _belongs(process, containers, supervised)
                if known:
                    yield replace(known, ids=(part.uuid,))
                else:
                    yield Claim(_describe(running, process), (part.uuid,))


def _belongs(
    process: Process, containers: Mapping[str, Claim], supervised: Mapping[int, Claim]
) -> Claim | None:
    for container in process.containers:
        if container in containers:
            return containers[container]
    return next((supervised[pid] for pid in process.ancestors if pid in supervised), None)


def _describe(running: GpuProcess, process: Process | None) -> str:
    memory = "" if running.memory_bytes is None else f", {format_size(running.memory_bytes)}"
    if process is None:
        return f"process {running.pid} (not visible from here{memory})"
    where = f" in container {process.containers[-1][:12]}" if process.containers else ""
    return f"process {running.pid} of {process.user}{where} ({process.command}{memory})"
