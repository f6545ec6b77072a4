"""Show a plan without acting: a table, and the commands a person would type for the same."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Sequence

from launcher.devices import format_cores
from launcher.engines.base import Mount, ReplicaSpec, mask
from launcher.engines.limits import CDI_GPU, LOG_BYTES, LOG_FILE_SIZE, LOG_FILES, SCRATCH_BYTES
from launcher.ownership import labels
from launcher.plan import Plan
from launcher.report import device_words
from launcher.sizes import format_size


def show_plan(plan: Plan, owner: int) -> list[str]:
    """Return the plan as lines: a table of replicas, and below it one command each."""
    rows = [("replica", "device", "cores", "memory", "passed variables")]
    for spec in plan.replicas:
        rows.append(
            (
                spec.name,
                device_words(spec.device.label),
                format_cores(spec.cores) or "all",
                format_size(spec.memory_bytes),
                ", ".join(sorted(spec.passed)) or "-",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = [
        "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    command = {"local": _process, "podman": podman_run}.get(plan.engine, docker_run)
    commands = [command(spec, owner) for spec in plan.replicas]
    return [f"fleet {plan.fleet} on the {plan.engine} engine", *table, "", *commands]


def docker_run(spec: ReplicaSpec, owner: int) -> str:
    """Return the `docker run` line that makes the same container; variables of the user's appear by name only.

    The one label left out repeats the whole line (`starling.plan`), so what this line starts is not ours.
    """
    devices = ",".join(spec.device.handles)
    gpu = ["--gpus", f'"device={devices}","capabilities=gpu,compute,utility"']
    log = [
        "--log-driver",
        "json-file",
        "--log-opt",
        f"max-size={LOG_FILE_SIZE}",
        "--log-opt",
        f"max-file={LOG_FILES}",
    ]
    return _run("docker", spec, owner, gpu, log, ["--network", spec.network])


def podman_run(spec: ReplicaSpec, owner: int) -> str:
    """Return the `podman run` line that makes the same container, as `docker_run` does; a rootless one's user stays."""
    gpu = [word for handle in spec.device.handles for word in ("--device", CDI_GPU.format(handle))]
    log = ["--log-driver", "k8s-file", "--log-opt", f"max-size={LOG_BYTES}"]
    own = [] if spec.network == "bridge" else ["--network", spec.network]
    own += ["--userns", "keep-id"] if owner else []
    for place in ("/run", "/var/tmp"):
        own += ["--tmpfs", f"{place}:rw,noexec,nosuid,nodev,mode=1777,size={SCRATCH_BYTES}"]
    return _run("podman", spec, owner, gpu, log, own)


def _run(
    program: str, spec: ReplicaSpec, owner: int, gpu: Sequence[str], log: Sequence[str], own: Sequence[str]
) -> str:
    """Return what both have in common, with each one's own options for a GPU, the log and the rest."""
    words = [program, "run", "--detach", "--init", "--name", spec.name, *own]
    for name, value in labels(spec, owner).items():
        if name != "starling.plan":
            words += ["--label", f"{name}={value}"]
    if spec.device.kind == "gpu":
        words += gpu
    if spec.cores:
        words += ["--cpuset-cpus", format_cores(spec.cores)]
    words += ["--memory", str(spec.memory_bytes), "--memory-swap", str(spec.memory_bytes)]
    words += ["--shm-size", str(spec.shm_bytes), "--pids-limit", str(spec.pids_limit)]
    words += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges:true", "--read-only"]
    words += ["--tmpfs", f"/tmp:rw,exec,nosuid,nodev,mode=1777,size={spec.tmp_bytes}", *log]
    words += ["--user", spec.user] if spec.user else []
    for mount in spec.mounts:
        words += ["--mount", _mount(mount)]
    words += _environment(spec, "--env")
    return shlex.join([*words, spec.image, *map(mask, spec.command)])


def _process(spec: ReplicaSpec, owner: int) -> str:
    """Return the shell line that runs the same process in a session of its own."""
    pin = ["taskset", "-c", format_cores(spec.cores)] if spec.cores else []
    settings = [f"{name}={value}" for name, value in sorted(spec.environment.items())]
    return shlex.join(["setsid", "env", *settings, *pin, *map(mask, spec.command)])


def _environment(spec: ReplicaSpec, option: str) -> Sequence[str]:
    words: list[str] = []
    for name, value in sorted(spec.environment.items()):
        words += [option, f"{name}={value}"]
    for name in sorted(spec.passed):
        words += [option, name]
    return words


def _mount(mount: Mount) -> str:
    """Return a --mount value: a CSV row, so that a comma in a path is quoted."""
    fields = ["type=bind", f"source={mount.source}", f"target={mount.target}"]
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow([*fields, "readonly"] if mount.read_only else fields)
    return text.getvalue()
