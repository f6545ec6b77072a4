"""What a replica's spec asks of Docker: limits and hardening, as docker-py's arguments."""

from __future__ import annotations

from typing import Any

import docker.types

from launcher.engines.base import ReplicaSpec
from launcher.engines.limits import LOG_FILE_SIZE, LOG_FILES
from launcher.ownership import labels
from launcher.sizes import format_cores


def container_options(spec: ReplicaSpec, owner: int) -> dict[str, Any]:
    """Return docker-py's arguments for a spec: detached, limited, hardened, without a terminal.

    Without a terminal Ctrl-C in `docker attach --sig-proxy=false` leaves the trainer alone.
    """
    options: dict[str, Any] = {
        "image": spec.image,
        "command": list(spec.command),
        "name": spec.name,
        "labels": labels(spec, owner),
        "environment": {**spec.passed, **spec.environment},
        "mounts": [
            docker.types.Mount(item.target, item.source, type=item.kind, read_only=item.read_only)
            for item in spec.mounts
        ],
        "user": spec.user or None,
        "detach": True,
        "tty": False,
        "stdin_open": False,
        "init": True,
        "network": spec.network or "bridge",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "read_only": True,
        # Compiled kernels are loaded from /tmp, so it must allow execution.
        "tmpfs": {"/tmp": f"rw,exec,nosuid,nodev,mode=1777,size={spec.tmp_bytes}"},
        "pids_limit": spec.pids_limit,
        "mem_limit": spec.memory_bytes,
        "memswap_limit": spec.memory_bytes,
        "shm_size": spec.shm_bytes,
        "log_config": docker.types.LogConfig(
            type="json-file", config={"max-size": LOG_FILE_SIZE, "max-file": str(LOG_FILES)}
        ),
    }
    if spec.cores:
        options["cpuset_cpus"] = format_cores(spec.cores)
    if spec.device.kind == "gpu":
        options["device_requests"] = [
            docker.types.DeviceRequest(
                device_ids=list(spec.device.handles), capabilities=[["gpu", "compute", "utility"]]
            )
        ]
    return options
