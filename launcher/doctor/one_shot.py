"""Start a container like a replica's, and check what it sees of the GPU, the memory and the runs folder."""

from __future__ import annotations

import contextlib
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from launcher.devices.devices import Device
from launcher.doctor.findings import Finding
from launcher.engines.base import Engine, Mount, ReplicaSpec
from launcher.options.request import RUNS_IN_IMAGE, TRAINER_IN_IMAGE
from starling.core.errors import StarlingError
from starling.core.units import MIB, format_size

MEMORY, SHM = 256 * MIB, 64 * MIB
END_S = 30.0

_PROBE = f"""
[ -f {TRAINER_IN_IMAGE[1]} ] && echo "trainer yes" || echo "trainer no"
echo "shm $(df -Pk /dev/shm | tail -n 1 | awk '{{print $2}}')"
echo "memory $(cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null | head -n 1)"
touch {RUNS_IN_IMAGE}/.doctor-$$ 2>/dev/null && rm {RUNS_IN_IMAGE}/.doctor-$$ && echo "runs yes" || echo "runs no"
command -v nvidia-smi >/dev/null && nvidia-smi -L | sed 's/^/gpu /'
exit 0
"""


@dataclass(frozen=True, slots=True)
class Sight:
    """What the container reported."""

    trainer: bool
    runs: bool
    shm_bytes: int
    memory: str
    gpus: tuple[str, ...]


def probe(engine: Engine, image: str, runs: Path | None, user: str, gpu: str | None) -> list[Finding]:
    """Run the container, judge its report, and always remove the container.

    `runs` is the folder to mount, None if it does not exist yet; `gpu` is the id of the GPU to ask for.
    """
    label = f"GPU {gpu}" if gpu is not None else "CPU"
    try:
        sight = _look(engine, _spec(image, runs, user, gpu))
    except StarlingError as error:
        return [Finding.of_error("container", error, f"on {label}: ")]
    found = [_trainer(image, sight), _limits(sight)]
    if runs is not None:
        found.append(_runs(runs, user, sight))
    if gpu is not None:
        found.append(_gpus(gpu, sight))
    return found


def _spec(image: str, runs: Path | None, user: str, gpu: str | None) -> ReplicaSpec:
    name = f"starling-doctor-{secrets.token_hex(4)}"
    mounts = () if runs is None else (Mount(source=str(runs), target=RUNS_IN_IMAGE, read_only=False),)
    return ReplicaSpec(
        name=name,
        fleet=f"starling/{name}",
        device=Device("cpu", "0") if gpu is None else Device("gpu", gpu),
        image=image,
        image_id="",
        command=("sh", "-c", _PROBE),
        environment={} if gpu is not None else {"NVIDIA_VISIBLE_DEVICES": "void"},
        mounts=mounts,
        runs=runs or Path("/"),
        user=user,
        memory_bytes=MEMORY,
        shm_bytes=SHM,
        tmp_bytes=16 * MIB,
        network="none",
    )


def _look(engine: Engine, spec: ReplicaSpec) -> Sight:
    replica_id = engine.create(spec)
    try:
        engine.start(replica_id)
        deadline = time.monotonic() + END_S
        while (state := engine.state(replica_id)) is not None and state.phase != "exited":
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        said = list(engine.logs(replica_id))
    finally:
        with contextlib.suppress(StarlingError):
            engine.remove(replica_id)
    words = dict(line.partition(" ")[::2] for line in said)
    return Sight(
        trainer=words.get("trainer") == "yes",
        runs=words.get("runs") == "yes",
        shm_bytes=int(words["shm"]) * 1024 if words.get("shm", "").isdigit() else 0,
        memory=words.get("memory", ""),
        gpus=tuple(line[4:] for line in said if line.startswith("gpu GPU ")),
    )


def _trainer(image: str, sight: Sight) -> Finding:
    if sight.trainer:
        return Finding("trainer", "ok", f"{image} holds it")
    return Finding(
        "trainer",
        "failure",
        f"{image} holds no {TRAINER_IN_IMAGE[1]}",
        "build it in the project's folder: docker build -t starling . (or name another with --image)",
    )


def _limits(sight: Sight) -> Finding:
    if sight.memory != str(MEMORY):
        return Finding(
            "container",
            "warning",
            f"asked for {format_size(MEMORY)} of memory, it sees a limit of {sight.memory or 'nothing'}",
            "enable the memory controller of cgroups",
        )
    if sight.shm_bytes != SHM:
        return Finding(
            "container",
            "warning",
            f"asked for {format_size(SHM)} of /dev/shm, it has {format_size(sight.shm_bytes)}",
            "look for default-shm-size and --ipc in the engine's settings",
        )
    return Finding("container", "ok", "starts with its limits of memory and /dev/shm")


def _runs(runs: Path, user: str, sight: Sight) -> Finding:
    if sight.runs:
        return Finding("runs inside", "ok", f"{runs}: a replica (user {user or 'root'}) can write there")
    return Finding(
        "runs inside",
        "failure",
        f"{runs}: a replica (user {user or 'root'}) cannot write there",
        f"sudo chown {user or 'UID:GID'} {runs}, or give --user; with SELinux or user namespaces check their labels",
    )


def _gpus(gpu: str, sight: Sight) -> Finding:
    if len(sight.gpus) == 1:
        return Finding(
            "GPU inside", "ok", f"asked for GPU {gpu}, the container sees exactly one: {sight.gpus[0]}"
        )
    if not sight.gpus:
        return Finding(
            "GPU inside",
            "failure",
            f"asked for GPU {gpu}, the container sees none",
            "sudo nvidia-ctk runtime configure --runtime=docker, restart Docker",
        )
    return Finding(
        "GPU inside",
        "failure",
        f"asked for GPU {gpu}, the container sees {len(sight.gpus)}: {'; '.join(sight.gpus)}",
        "an image or a runtime that gives out all devices: look for NVIDIA_VISIBLE_DEVICES and accept-nvidia-visible-devices",
    )
