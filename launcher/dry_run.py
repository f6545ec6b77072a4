"""Show a plan without acting: a table, and the commands a person would type for the same."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Sequence

from launcher.devices import format_cores
from launcher.engines.base import Mount, ReplicaSpec, mask
from launcher.engines.limits import LOG_FILE_SIZE, LOG_FILES
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
    command = _process if plan.engine == "local" else docker_run
    commands = [command(spec, owner) for spec in plan.replicas]
    return [f"fleet {plan.fleet} on the {plan.engine} engine", *table, "", *commands]


def docker_run(spec: ReplicaSpec, owner: int) -> str:
    """Return the `docker run` line that makes the same container; variables of the user's appear by name only.

    The one label left out repeats the whole line (`starling.plan`), so what this line starts is not ours.
    """
    words = ["docker", "run", "--detach", "--init", "--name", spec.name, "--network", spec.network]
    for name, value in labels(spec, owner).items():
        if name != "starling.plan":
            words += ["--label", f"{name}={value}"]
    if spec.device.kind == "gpu":
        devices = ",".join(spec.device.handles)
        words += ["--gpus", f'"device={devices}","capabilities=gpu,compute,utility"']
    if spec.cores:
        words += ["--cpuset-cpus", format_cores(spec.cores)]
    words += ["--memory", str(spec.memory_bytes), "--memory-swap", str(spec.memory_bytes)]
    words += ["--shm-size", str(spec.shm_bytes), "--pids-limit", str(spec.pids_limit)]
    words += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges:true", "--read-only"]
    words += ["--tmpfs", f"/tmp:rw,exec,nosuid,nodev,mode=1777,size={spec.tmp_bytes}"]
    words += [
        "--log-driver",
        "json-file",
        "--log-opt",
        f"max-size={LOG_FILE_SIZE}",
        "--log-opt",
        f"max-file={LOG_FILES}",
    ]
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
