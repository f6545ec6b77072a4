"""Show a plan without acting: a table, and the commands a person would type for the same."""

from __future__ import annotations

import csv
import io
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import starling.core.handover
from launcher.engines import hardening
from launcher.engines.base import Mount, ReplicaSpec, ReplicaState
from launcher.engines.labels import labels
from launcher.engines.limits import CDI_GPU
from launcher.options.env_file import read_env_file
from launcher.plan.plan import Plan
from launcher.sizes import format_cores, format_size
from launcher.status.words import device_words
from starling.core.redaction import masked


def show_plan(plan: Plan, owner: int, env_files: Sequence[Path] = ()) -> list[str]:
    """Return the plan as lines: a table of replicas, below it what a person would type for the same, and what to know."""
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
    if plan.engine == "local":
        commands = [_process(spec) for spec in plan.replicas]
    else:
        run = podman_run if plan.engine == "podman" else docker_run
        commands = [
            *_make_runs(plan.replicas[0]),
            *(run(spec, owner, env_files) for spec in plan.replicas),
        ]
    if any(masked(word) != word for spec in plan.replicas for word in spec.command):
        commands.insert(
            0, "# *** stands for a password or a token: put it back in the command at the end of each line"
        )
    notes = [f"note: {note}" for note in plan.notes]
    wrong = [f"would fail now: {problem}".replace("\n", "\n  ") for problem in plan.problems]
    return [f"fleet {plan.fleet} on the {plan.engine} engine", *table, "", *commands, *notes, *wrong]


def rehearsal_notes(existing: Sequence[ReplicaState], *, recreate: bool) -> list[str]:
    """Return what `up` would do with the replicas that the fleet has already."""
    if recreate and existing:
        count = f"{len(existing)} replica{'s' * (len(existing) != 1)}"
        return [f"--recreate: {count} of this fleet would be stopped and removed first"]
    kept = {
        "running": [state.name for state in existing if state.live],
        "finished": [state.name for state in existing if state.finished],
    }
    return [
        f"already {what}: {', '.join(names)}; `up` leaves {'it as it is' if len(names) == 1 else 'them as they are'}"
        for what, names in kept.items()
        if names
    ]


def _make_runs(spec: ReplicaSpec) -> list[str]:
    """Return the line that makes the runs folder, or gives root's files in it to the replicas' user, where `up` would."""
    runs, (uid, _, _) = spec.runs, spec.user.partition(":")
    as_root = os.getuid() == 0 and uid not in ("", "0")
    if not runs.exists():
        owner = ["-o", uid, "-g", spec.user.partition(":")[2]] if as_root else []
        return [shlex.join(["install", "-d", "-m", "700", *owner, str(runs)])]
    if as_root and runs.stat().st_uid == 0:
        # `chown -R` looks names up anew, and would hand over hard links to files of the system's.
        return [
            shlex.join([sys.executable, "-I", str(starling.core.handover.__file__), str(runs), spec.user])
        ]
    return []


def docker_run(spec: ReplicaSpec, owner: int, env_files: Sequence[Path] = ()) -> str:
    """Return the `docker run` line that makes the same container, with our labels, so that it is a replica of ours.

    Variables of the user's appear by name only, or as the file that they came from.
    """
    own = ["--network", spec.network]
    if spec.device.kind == "gpu":  # the client itself adds the capability `gpu`
        devices = ",".join(spec.device.handles)
        own += ["--gpus", f'"device={devices}","capabilities=compute,utility"']
    return _run("docker", spec, owner, env_files, own)


def podman_run(spec: ReplicaSpec, owner: int, env_files: Sequence[Path] = ()) -> str:
    """Return the `podman run` line that makes the same container, as `docker_run` does."""
    own = [] if spec.network == "bridge" else ["--network", spec.network]
    own += ["--userns", "keep-id"] if owner else []  # a user's own Podman is rootless
    for handle in spec.device.handles if spec.device.kind == "gpu" else ():
        own += ["--device", CDI_GPU.format(handle)]
    return _run("podman", spec, owner, env_files, own)


def _run(
    kind: hardening.Kind, spec: ReplicaSpec, owner: int, env_files: Sequence[Path], own: Sequence[str]
) -> str:
    """Return what both have in common, around each one's own options."""
    words = [kind, "run", "--detach", "--name", spec.name, *own]
    for name, value in labels(spec, owner).items():
        words += ["--label", f"{name}={value}"]
    words += hardening.words(spec, kind)
    for mount in spec.mounts:
        words += ["--mount", _mount(mount)]
    words += _environment(spec, env_files)
    return shlex.join([*words, spec.image, *map(masked, spec.command)])


def _process(spec: ReplicaSpec) -> str:
    """Return the shell line that runs the same process in a session of its own."""
    pin = ["taskset", "-c", format_cores(spec.cores)] if spec.cores else []
    settings = [f"{name}={value}" for name, value in sorted(spec.environment.items())]
    return shlex.join(["setsid", "env", *settings, *pin, *map(masked, spec.command)])


def _environment(spec: ReplicaSpec, env_files: Sequence[Path]) -> list[str]:
    """Return the options that set a container's variables; Docker lets --env win over --env-file, as `up` does."""
    words = [word for path in env_files for word in ("--env-file", str(path))]
    from_files: dict[str, str] = {}
    for path in env_files:
        from_files.update(read_env_file(path, os.environ))
    for name, value in sorted(spec.environment.items()):
        words += ["--env", f"{name}={value}"]
    for name in sorted(spec.passed.keys() - spec.environment.keys()):
        if from_files.get(name) != spec.passed[name]:
            words += ["--env", name]
    return words


def _mount(mount: Mount) -> str:
    """Return a --mount value: a CSV row, so that a comma in a path is quoted."""
    fields = [f"type={mount.kind}", f"source={mount.source}", f"target={mount.target}"]
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow([*fields, "readonly"] if mount.read_only else fields)
    return text.getvalue()
