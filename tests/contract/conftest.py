"""One engine after the other for the contract suite, each with a throw-away world of its own."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from launcher.devices import Device
from launcher.engines.base import Engine, Mount, ReplicaSpec
from launcher.engines.local import LocalEngine
from launcher.sizes import MIB
from tests.docker.conftest import missing

IMAGES = [os.environ[name] for name in ("BASE",) if name in os.environ] + [
    "base:bookworm",
    "python:3.11-slim",
]
"""Images with a python3, of which `scripts/test` has built or pulled one."""


@cache
def base_image() -> str:
    """Return the first of the images that the engine has; skip, or fail, where it has none or does not answer."""
    from launcher.engines.docker import DockerEngine
    from launcher.errors import EngineError

    problem = ""
    for image in IMAGES:
        try:
            DockerEngine(0).resolve_image(image)
        except EngineError as error:
            problem = str(error)
        else:
            return image
    missing(problem)
    raise AssertionError("missing() does not return")


@dataclass(frozen=True)
class World:
    """An engine, a maker of specs for it, and a second handle on it, as another command would hold."""

    engine: Engine
    reopen: Callable[[], Engine]
    runs: Path
    fleet: str

    def spec(self, code: str, replica: str = "a", **changes: object) -> ReplicaSpec:
        """Return a spec of a replica that runs `code` in Python."""
        isolated = self.engine.name == "docker"
        values: dict[str, object] = {
            "name": f"{self.fleet.replace('/', '-')}-{replica}",
            "fleet": self.fleet,
            "device": Device("cpu", "0"),
            "image": base_image() if isolated else "",
            "image_id": "",
            "command": ("python3", "-u", "-c", code),
            "environment": {"STARLING_REPLICA": replica},
            "runs": self.runs,
            "mounts": (Mount(source=str(self.runs), target="/runs", read_only=False),) if isolated else (),
            "user": f"{os.getuid()}:{os.getgid()}" if isolated else "",
            "memory_bytes": 128 * MIB,
            "shm_bytes": 16 * MIB,
            "tmp_bytes": 16 * MIB,
            "network": "none" if isolated else "",
            "cores": (0,),
        }
        return ReplicaSpec(**{**values, **changes})  # type: ignore[arg-type]


def docker_engine(owner: int) -> Engine:
    """Return the Docker engine, or skip where there is none, or no image to run."""
    from launcher.engines.docker import DockerEngine

    base_image()
    return DockerEngine(owner)


@pytest.fixture(params=["local", pytest.param("docker", marks=pytest.mark.docker)])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """Return a world that holds nothing of anybody else's, and leaves nothing behind."""
    # An owner of this test's own keeps parallel runs, and real fleets on this machine, out of sight.
    owner = 10**9 + uuid.uuid4().int % 10**8
    runs = tmp_path / "runs"
    runs.mkdir()

    def reopen() -> Engine:
        return LocalEngine(runs, owner) if request.param == "local" else docker_engine(owner)

    engine = reopen()
    yield World(engine, reopen, runs, f"test/{uuid.uuid4().hex[:8]}")
    for state in engine.list():
        engine.remove(state.id)
