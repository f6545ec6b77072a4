"""Open the engine that `--engine` names."""

from __future__ import annotations

import os
from pathlib import Path

from launcher.engines.base import Engine
from launcher.hosts.ownership import caller_ids
from starling.core.paths import absolute


def open_engine(name: str, runs: Path) -> Engine:
    """Return the engine that `--engine` names; raises EngineError when it does not answer."""
    owner = caller_ids()[0]
    if name == "local":
        from launcher.engines.local.local import LocalEngine

        return LocalEngine(absolute(runs), owner)
    if name == "docker":
        from launcher.engines.docker.docker import DockerEngine
        from launcher.hosts.address import open_box

        box = open_box()
        engine = DockerEngine(owner if box is None else box.ids[0])
        if box is not None or not engine.is_podman:
            return engine
    from launcher.engines.podman import PodmanEngine, socket_address

    return PodmanEngine(owner, None if name == "docker" else socket_address(os.environ, os.getuid()))
