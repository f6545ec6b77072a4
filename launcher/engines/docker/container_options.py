"""Turn a replica's spec into docker-py's arguments."""

from __future__ import annotations

from typing import Any

from docker.types import DeviceRequest, HostConfig, LogConfig, Mount

from launcher.engines.base import ReplicaSpec
from launcher.engines.hardening import docker_arguments, log, scratch
from launcher.engines.labels import labels


def container_options(spec: ReplicaSpec, owner: int, version: str) -> dict[str, Any]:
    """Return the arguments of docker-py's `create_container` for a spec: detached, bounded, without a terminal.

    Without a terminal, Ctrl-C in `docker attach --sig-proxy=false` does not end the trainer. `version` is the API's.
    """
    bounds = docker_arguments(spec)
    return {
        **bounds,
        "image": spec.image,
        "command": list(spec.command),
        "name": spec.name,
        "labels": labels(spec, owner),
        "environment": {**spec.passed, **spec.environment},
        "detach": True,
        "tty": False,
        "stdin_open": False,
        "host_config": HostConfig(version, **bounds["host_config"], **_host_options(spec)),
    }


def _host_options(spec: ReplicaSpec) -> dict[str, Any]:
    kept = log("docker")
    options: dict[str, Any] = {
        "mounts": [
            Mount(item.target, item.source, type=item.kind, read_only=item.read_only) for item in spec.mounts
        ],
        "network_mode": spec.network or "bridge",
        "tmpfs": {folder.place: ",".join(folder.options) for folder in scratch(spec, "docker")},
        "log_config": LogConfig(type=kept.driver, config=dict(kept.options)),
    }
    if spec.device.kind == "gpu":
        options["device_requests"] = [
            DeviceRequest(device_ids=list(spec.device.handles), capabilities=[["gpu", "compute", "utility"]])
        ]
    return options
