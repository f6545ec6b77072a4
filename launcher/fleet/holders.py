"""Find the holders of this machine's GPUs: replicas of any fleet and user, other containers, other processes."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.devices.devices import replica_gpus
from launcher.devices.holders import GpuHolder
from launcher.devices.inventory import Gpu, GpuProcess, MigSlice
from launcher.engines.base import Engine
from launcher.engines.labels import DEVICE_LABEL, FLEET_LABEL, REPLICA_LABEL, plan_of
from launcher.errors import EngineError
from launcher.hosts.address import engine_address, socket_path
from launcher.hosts.processes import PROC, Process, command_words, find_process, user_id, user_name
from launcher.hosts.this_machine import ThisMachine
from launcher.status.progress import read_json
from starling.core.units import format_size
from starling.core.words import printable

_SUPERVISOR = re.compile(r"(^|/)launcher/engines/(local/)?supervisor\.py$")
"""The supervisor's path on a command line, in this version and in earlier ones."""


def find_holders(
    engine: Engine, gpus: Sequence[Gpu] | None, own: Collection[str], *, proc: Path = PROC
) -> tuple[GpuHolder, ...]:
    """Return the holders of GPUs, without the replicas whose ids are in `own`.

    Holders are the engine's containers or replicas. If the engine is on this machine, holders are also all users' local
    replicas, Docker's containers beside the local engine, and the processes that compute on `gpus`.
    """
    holders = list(engine.gpu_holders())
    if not engine.host.remote:
        supervised = local_replicas(proc)
        holders += supervised.values()
        if engine.name == "local":
            holders += _containers(engine.host.owner)
        holders += _processes(gpus or (), holders, supervised, proc)
    return tuple(dict.fromkeys(holder for holder in holders if holder.id not in own))


def local_replicas(proc: Path = PROC) -> dict[int, GpuHolder]:
    """Return the local engine's replicas of all users and runs folders, by the pid of their supervisor."""
    found = {}
    for folder in proc.iterdir():
        if folder.name.isdecimal() and (holder := _supervised(folder)):
            found[int(folder.name)] = holder
    return found


def _supervised(folder: Path) -> GpuHolder | None:
    """Return a supervisor's replica, given its folder in `/proc`; its GPUs are known only if its record can be read."""
    words = command_words(folder)
    found = [at for at, word in enumerate(words[:4]) if _SUPERVISOR.search(word)]
    if not found or len(words) <= found[0] + 1 or "python" not in Path(words[0]).name:
        return None
    exit_file = Path(words[found[0] + 1])
    name = printable(exit_file.name.removesuffix(".exit.json"))
    uid = user_id(folder)
    if uid is None:
        return None
    of_whom = "" if uid == os.getuid() else f" of {user_name(uid)}"
    record = read_json(exit_file.with_name(f"{name}.json"))
    labels, plan = _labels_and_plan(record)
    if plan is None or labels.get(REPLICA_LABEL) != name:
        return GpuHolder(f"local replica {name}{of_whom} (process {folder.name})", (), f"pid {folder.name}")
    fleet = printable(labels.get(FLEET_LABEL, ""))
    command = ["launcher", "stop", "--engine", "local", "--runs", str(exit_file.parent.parent), fleet]
    return GpuHolder(
        name=f"{name} of fleet {fleet}{of_whom}",
        gpus=replica_gpus(labels.get(DEVICE_LABEL, ""), plan),
        id=str(record.get("id")),
        remedy="" if of_whom else printable(shlex.join(command)),
    )


def _labels_and_plan(record: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any] | None]:
    """Return a record's labels and plan; the plan is None unless valid, since the file may come from another user."""
    found = record.get("labels")
    labels = (
        {key: text for key, text in found.items() if isinstance(text, str)} if isinstance(found, dict) else {}
    )
    try:
        return labels, plan_of(labels)
    except ValueError:  # text that cannot be encoded
        return labels, None


def _containers(owner: int) -> Sequence[GpuHolder]:
    """Return Docker's containers; empty if no Docker beside the local engine answers."""
    try:
        socket = socket_path(engine_address())
        if socket is None or not os.path.exists(socket):
            return []
        from launcher.engines.docker.docker import DockerEngine

        return DockerEngine(owner, ThisMachine()).gpu_holders()
    except EngineError:
        return []


def _processes(
    gpus: Sequence[Gpu], holders: Sequence[GpuHolder], supervised: Mapping[int, GpuHolder], proc: Path
) -> Iterator[GpuHolder]:
    """Yield a holder for each process on a GPU, named after the container or replica that it belongs to."""
    containers = {holder.id: holder for holder in holders if holder.id}
    for gpu in gpus:
        parts: tuple[Gpu | MigSlice, ...] = (gpu, *gpu.slices)
        for part in parts:
            for running in part.processes:
                process = find_process(running.pid, proc)
                known = process and _belongs_to(process, containers, supervised)
                if known:
                    yield replace(known, gpus=(part.uuid,))
                else:
                    yield GpuHolder(_describe(running, process), (part.uuid,))


def _belongs_to(
    process: Process, containers: Mapping[str, GpuHolder], supervised: Mapping[int, GpuHolder]
) -> GpuHolder | None:
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
