"""Find the host of an engine, and open the engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.hosts.address import engine_address, podman_address, socket_path
from launcher.hosts.this_machine import TcpHost, ThisMachine
from starling.core.paths import absolute

if TYPE_CHECKING:
    from launcher.engines.base import Engine
    from launcher.engines.docker.docker import DockerEngine
    from launcher.hosts.host import Host


def find_host(engine: str, given: str | None = None, environment: Mapping[str, str] = os.environ) -> Host:
    """Return the machine on which the engine of this name runs replicas; connects to an `ssh://` address.

    `given` is the address from `--host`. Raises EngineError if the Docker context does not exist, or if the machine
    cannot be reached; the message then is ssh's.
    """
    if engine == "local":
        return ThisMachine(environment)
    if engine == "podman":
        address = given or podman_address(environment, os.getuid())
        environment = {"DOCKER_HOST": address}
    else:
        address = given or engine_address(environment)
        environment = environment if given is None else {**environment, "DOCKER_HOST": given}
        if address.startswith("ssh://"):
            from launcher.hosts.ssh_connection import SshConnection
            from launcher.hosts.ssh_host import SshHost

            return SshHost(SshConnection(address), environment)
    return TcpHost(environment) if socket_path(address) is None else ThisMachine(environment)


def open_engine(engine: str, host: Host, runs: Path) -> Engine:
    """Return the engine that `--engine` names; raises EngineError if it does not answer."""
    if engine == "local":
        from launcher.engines.local.local import LocalEngine

        return LocalEngine(absolute(runs), host.owner)
    if engine == "docker":
        return open_docker(host)
    from launcher.engines.podman import PodmanEngine

    return PodmanEngine(host.owner, host)


def open_docker(host: Host) -> DockerEngine:
    """Return the engine at Docker's address, which may be Podman on this machine; raises EngineError without one."""
    from launcher.engines.docker.docker import DockerEngine

    engine = DockerEngine(host.owner, host)
    if host.address or not engine.is_podman:
        return engine
    from launcher.engines.podman import PodmanEngine

    return PodmanEngine(host.owner, host)
