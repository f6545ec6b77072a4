"""Show a plan without acting: a table, and the equivalent shell commands."""

from __future__ import annotations

import csv
import io
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import starling.core.handover
from launcher.engines import hardening
from launcher.engines.base import Mount, ReplicaSpec
from launcher.engines.labels import labels
from launcher.engines.limits import CDI_GPU
from launcher.options.request import EnvFile
from launcher.plan.facts import Facts
from launcher.plan.plan import Plan
from launcher.status.words import device_words
from starling.core.errors import StarlingError
from starling.core.redaction import masked
from starling.core.units import format_cores, format_size


def document(plan: Plan, problems: Sequence[StarlingError]) -> dict[str, Any]:
    """Return the plan and its problems as plain values without secrets."""
    return {
        "engine": plan.engine,
        "fleet": plan.fleet,
        "replicas": [spec.public() | {"spec": spec.digest} for spec in plan.replicas],
        "notes": [*plan.notes, *_rehearsal_notes(plan)],
        "problems": [{"message": str(problem), "exit_code": problem.exit_code} for problem in problems],
    }


def describe(plan: Plan, facts: Facts, problems: Sequence[StarlingError]) -> list[str]:
    """Return the plan as lines: a table of replicas, the equivalent shell commands, notes and problems."""
    commands = _commands(plan, facts)
    if any(masked(word) != word for spec in plan.replicas for word in spec.command):
        commands.insert(
            0, "# *** stands for a password or a token: put it back in the command at the end of each line"
        )
    notes = [f"note: {note}" for note in (*plan.notes, *_rehearsal_notes(plan))]
    wrong = [f"would fail now: {problem}".replace("\n", "\n  ") for problem in problems]
    head = f"fleet {plan.fleet} on the {plan.engine} engine"
    return [head, *_table(plan.replicas), "", *commands, *notes, *wrong]


def _table(replicas: Sequence[ReplicaSpec]) -> list[str]:
    rows = [("replica", "device", "cores", "memory", "passed variables")]
    rows += [
        (
            spec.name,
            device_words(spec.device.label),
            format_cores(spec.cores) or "all",
            format_size(spec.memory_bytes),
            ", ".join(sorted(spec.passed)) or "-",
        )
        for spec in replicas
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _commands(plan: Plan, facts: Facts) -> list[str]:
    if plan.engine == "local":
        return [_process(spec) for spec in plan.replicas]
    run = podman_run if plan.engine == "podman" else docker_run
    lines = [run(spec, facts.owner, plan.request.env_files) for spec in plan.replicas]
    return [*make_runs(plan.request.runs, plan.request.user, facts), *lines]


def _rehearsal_notes(plan: Plan) -> list[str]:
    """Return notes on what `up` would do first, and what it would do with the fleet's existing replicas."""
    changes, notes = plan.changes, []
    if changes.stop:
        count = f"{len(changes.stop)} replica{'s' * (len(changes.stop) != 1)}"
        notes.append(f"--recreate: {count} of this fleet would be stopped and removed first")
    for what, names in (("running", changes.running), ("finished", changes.finished)):
        if names:
            leaves = "it as it is" if len(names) == 1 else "them as they are"
            notes.append(f"already {what}: {', '.join(names)}; `up` leaves {leaves}")
    if plan.request.build:
        notes.append(f"{plan.request.image} would be built first")
    return notes


def make_runs(runs: Path, user: str, facts: Facts) -> list[str]:
    """Return the command that makes the runs folder or changes the owner of root's files in it, if `up` would do so."""
    uid, _, gid = user.partition(":")
    as_root = facts.uid == 0 and uid not in ("", "0")
    if facts.runs_owner is None:
        owner = ["-o", uid, "-g", gid] if as_root else []
        return [shlex.join(["install", "-d", "-m", "700", *owner, str(runs)])]
    if as_root and facts.runs_owner == 0:
        # `chown -R` resolves names again, and would also change hard links to system files.
        return [shlex.join([sys.executable, "-I", str(starling.core.handover.__file__), str(runs), user])]
    return []


def docker_run(spec: ReplicaSpec, owner: int, env_files: Sequence[EnvFile] = ()) -> str:
    """Return the `docker run` line that makes the same container, with our labels, which make it a replica.

    The user's variables appear only by name, or as the file that they came from.
    """
    own = ["--network", spec.network]
    if spec.device.kind == "gpu":  # the client itself adds the capability `gpu`
        devices = ",".join(spec.device.handles)
        own += ["--gpus", f'"device={devices}","capabilities=compute,utility"']
    return _run("docker", spec, owner, env_files, own)


def podman_run(spec: ReplicaSpec, owner: int, env_files: Sequence[EnvFile] = ()) -> str:
    """Return the `podman run` line that makes the same container, with our labels."""
    own = [] if spec.network == "bridge" else ["--network", spec.network]
    own += ["--userns", "keep-id"] if owner else []  # an ordinary user's Podman is rootless
    for handle in spec.device.handles if spec.device.kind == "gpu" else ():
        own += ["--device", CDI_GPU.format(handle)]
    return _run("podman", spec, owner, env_files, own)


def _run(
    kind: hardening.Kind, spec: ReplicaSpec, owner: int, env_files: Sequence[EnvFile], own: Sequence[str]
) -> str:
    """Return the `run` line of Docker or Podman, with the engine's `own` options."""
    words = [kind, "run", "--detach", "--name", spec.name, *own]
    for name, value in labels(spec, owner).items():
        words += ["--label", f"{name}={value}"]
    words += hardening.words(spec, kind)
    for mount in spec.mounts:
        words += ["--mount", _mount(mount)]
    words += _environment(spec, env_files)
    return shlex.join([*words, spec.image, *map(masked, spec.command)])


def _process(spec: ReplicaSpec) -> str:
    """Return the shell line that runs the same process in its own session."""
    pin = ["taskset", "-c", format_cores(spec.cores)] if spec.cores else []
    settings = [f"{name}={value}" for name, value in sorted(spec.environment.items())]
    return shlex.join(["setsid", "env", *settings, *pin, *map(masked, spec.command)])


def _environment(spec: ReplicaSpec, env_files: Sequence[EnvFile]) -> list[str]:
    """Return the options that set a container's variables; for Docker and `up`, --env wins over --env-file."""
    words = [word for file in env_files for word in ("--env-file", str(file.path))]
    from_files: dict[str, str] = {}
    for file in env_files:
        from_files.update(file.variables)
    for name, value in sorted(spec.environment.items()):
        words += ["--env", f"{name}={value}"]
    for name in sorted(spec.passed.keys() - spec.environment.keys()):
        if from_files.get(name) != spec.passed[name]:
            words += ["--env", name]
    return words


def _mount(mount: Mount) -> str:
    """Return a --mount value: a CSV row, which quotes a comma in a path."""
    fields = [f"type={mount.kind}", f"source={mount.source}", f"target={mount.target}"]
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow([*fields, "readonly"] if mount.read_only else fields)
    return text.getvalue()
