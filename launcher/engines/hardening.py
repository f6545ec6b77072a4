"""The limits of every replica's container: one list, translated for docker-py, Podman and the commands of a dry run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from launcher.engines.base import ReplicaSpec
from launcher.engines.limits import LOG_BYTES, LOG_FILE_SIZE, LOG_FILES, SCRATCH_BYTES, STOP_GRACE_S
from starling.core.units import format_cores

Kind = Literal["docker", "podman"]

NO_PRIVILEGES = ("no-new-privileges:true",)


@dataclass(frozen=True, slots=True)
class Bound:
    """One limit and its three spellings; an empty value means no limit."""

    value: bool | int | str | tuple[str, ...]
    flag: str
    """The flag of `docker run` and of `podman run`."""
    docker: str
    """The argument of docker-py's `create_container`; the prefix `host_config.` marks an argument of HostConfig."""
    podman: str
    """The path in the body of Podman's `create` request."""
    podman_value: bool | None = None
    """The value in Podman's body, if it differs from `value`."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """A folder in memory, writable below a read-only root."""

    place: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Log:
    """The log driver, and the options that limit its size on the host's disk."""

    driver: str
    options: Mapping[str, str]


def bounds(spec: ReplicaSpec) -> tuple[Bound, ...]:
    """Return a replica's limits, the same for both kinds of engine."""
    memory, pids = spec.memory_bytes, "resource_limits.pids.limit"
    return (
        Bound(True, "--init", "host_config.init", "init"),
        Bound(STOP_GRACE_S, "--stop-timeout", "stop_timeout", "stop_timeout"),
        Bound(format_cores(spec.cores), "--cpuset-cpus", "host_config.cpuset_cpus", "resource_limits.cpu.cpus"),
        Bound(memory, "--memory", "host_config.mem_limit", "resource_limits.memory.limit"),
        Bound(memory, "--memory-swap", "host_config.memswap_limit", "resource_limits.memory.swap"),
        Bound(spec.shm_bytes, "--shm-size", "host_config.shm_size", "shm_size"),
        Bound(spec.pids_limit, "--pids-limit", "host_config.pids_limit", pids),
        Bound(("ALL",), "--cap-drop", "host_config.cap_drop", "cap_drop"),
        Bound(NO_PRIVILEGES, "--security-opt", "host_config.security_opt", "no_new_privileges", podman_value=True),
        Bound(True, "--read-only", "host_config.read_only", "read_only_filesystem"),
        Bound(spec.user, "--user", "user", "user"),
    )  # fmt: skip


def scratch(spec: ReplicaSpec, kind: Kind) -> tuple[Scratch, ...]:
    """Return the writable folders; Podman adds two of its own, whose size is limited too."""
    # Compiled kernels are loaded from /tmp, so it must allow execution.
    places = [("/tmp", "exec", spec.tmp_bytes)]
    if kind == "podman":
        places += [("/run", "noexec", SCRATCH_BYTES), ("/var/tmp", "noexec", SCRATCH_BYTES)]
    return tuple(
        Scratch(place, ("rw", execution, "nosuid", "nodev", "mode=1777", f"size={size}"))
        for place, execution, size in places
    )


def log(kind: Kind) -> Log:
    """Return how the output is kept; Podman keeps one file and truncates it when it is full."""
    if kind == "podman":
        return Log("k8s-file", {"max-size": str(LOG_BYTES)})
    return Log("json-file", {"max-size": LOG_FILE_SIZE, "max-file": str(LOG_FILES)})


def words(spec: ReplicaSpec, kind: Kind) -> list[str]:
    """Return the limits as options of `docker run` or `podman run`."""
    found: list[str] = []
    for bound in _asked(spec):
        if bound.value is True:
            found.append(bound.flag)
        else:
            values = bound.value if isinstance(bound.value, tuple) else (str(bound.value),)
            found += [word for value in values for word in (bound.flag, value)]
    for folder in scratch(spec, kind):
        found += ["--tmpfs", f"{folder.place}:{','.join(folder.options)}"]
    kept = log(kind)
    found += ["--log-driver", kept.driver]
    for name, option in kept.options.items():
        found += ["--log-opt", f"{name}={option}"]
    return found


def docker_arguments(spec: ReplicaSpec) -> dict[str, Any]:
    """Return the limits as arguments of docker-py's `create_container`, those of HostConfig as a dictionary."""
    return _nested((bound.docker, bound.value) for bound in _asked(spec))


def podman_body(spec: ReplicaSpec) -> dict[str, Any]:
    """Return the limits as part of the body of Podman's `create` request."""
    return _nested(
        (bound.podman, bound.value if bound.podman_value is None else bound.podman_value)
        for bound in _asked(spec)
    )


def _asked(spec: ReplicaSpec) -> list[Bound]:
    return [bound for bound in bounds(spec) if bound.value != ""]


def _nested(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return {"a": {"b": 1}} for "a.b" and 1."""
    tree: dict[str, Any] = {}
    for path, value in items:
        *folders, name = path.split(".")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = list(value) if isinstance(value, tuple) else value
    return tree
