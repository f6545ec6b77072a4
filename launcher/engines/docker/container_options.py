"""What a replica's spec asks of Docker: limits and hardening, as docker-py's arguments."""

from __future__ import annotations

from typing import Any

from docker.types import DeviceRequest, HostConfig, LogConfig, Mount

from launcher.engines.base import ReplicaSpec
from launcher.engines.limits import LOG_FILE_SIZE, LOG_FILES, STOP_GRACE_S
from launcher.hosts.ownership import labels
from launcher.sizes import format_cores


def container_options(spec: ReplicaSpec, owner: int, version: str) -> dict[str, Any]:
    """Return the arguments of docker-py's `create_container` for a spec: detached, limited, hardened, without a terminal.

    Without a terminal Ctrl-C in `docker attach --sig-proxy=false` leaves the trainer alone. `version` is the API's.
    """
    return {
        "image": spec.image,
        "command": list(spec.command),
        "name": spec.name,
        "labels": labels(spec, owner),
        "environment": {**spec.passed, **spec.environment},
        "user": spec.user or None,
        "detach": True,
        "tty": False,
        "stdin_open": False,
        "stop_timeout": STOP_GRACE_S,
        "host_config": HostConfig(version, **_host_options(spec)),
    }


def _host_options(spec: ReplicaSpec) -> dict[str, Any]:
    options: dict[str, Any] = {
        "mounts": [
            Mount(item.target, item.source, type=item.kind, read_only=item.read_only) for item in spec.mounts
        ],
        "init": True,
        "network_mode": spec.network or "bridge",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "read_only": True,
        # Compiled kernels are loaded from /tmp, so it must allow execution.
        "tmpfs": {"/tmp": f"rw,exec,nosuid,nodev,mode=1777,size={spec.tmp_bytes}"},
        "pids_limit": spec.pids_limit,
        "mem_limit": spec.memory_bytes,
        "memswap_limit": spec.memory_bytes,
        "shm_size": spec.shm_bytes,
        "log_config": LogConfig(
            type="json-file", config={"max-size": LOG_FILE_SIZE, "max-file": str(LOG_FILES)}
        ),
    }
    if spec.cores:
        options["cpuset_cpus"] = format_cores(spec.cores)
    if spec.device.kind == "gpu":
        options["device_requests"] = [
            DeviceRequest(device_ids=list(spec.device.handles), capabilities=[["gpu", "compute", "utility"]])
        ]
    return options
