"""One engine after the other for the contract suite, each with a throw-away world of its own; a ClearML double."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from launcher.devices.devices import Device
from launcher.engines.base import Engine, Mount, ReplicaSpec
from launcher.engines.local.local import LocalEngine
from launcher.fleet import bring_up as fleet
from launcher.hosts.this_machine import ThisMachine
from launcher.plan.changes import Changes, plan_changes
from launcher.plan.check import check_fleet
from starling.core.units import MIB
from tests.conftest import PYTHON_PATH
from tests.docker.conftest import missing
from tests.doubles.clearml_server import ClearmlServerDouble

IMAGES = [os.environ[name] for name in ("BASE",) if name in os.environ] + [
    "base:bookworm",
    "python:3.11-slim",
]
"""Images with a python3, of which `scripts/test` has built or pulled one."""


@cache
def base_image() -> str:
    """Return the first of the images that the engine has; skip, or fail, where it has none or does not answer."""
    from launcher.engines.docker.docker import DockerEngine
    from launcher.errors import EngineError

    problem = ""
    for image in IMAGES:
        try:
            DockerEngine(0, ThisMachine()).resolve_image(image)
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

    @property
    def tells_oom(self) -> bool:
        """Whether the engine says that memory ended a replica; Podman 4.3 loses its own note of it."""
        if self.engine.name != "podman":
            return True
        api = self.engine._to.client  # type: ignore[attr-defined]
        version = api.get(f"{api.base_url}/_ping").headers["Libpod-Api-Version"]
        return tuple(map(int, version.split(".")[:2])) > (4, 3)

    def spec(self, code: str, replica: str = "a", **changes: object) -> ReplicaSpec:
        """Return a spec of a replica that runs `code` in Python."""
        isolated = self.engine.name != "local"
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


def bring_up(
    engine: Engine,
    specs: Sequence[ReplicaSpec],
    *,
    recreate: bool = False,
    settle_s: float = 0.0,
) -> Changes:
    """Bring the fleet of `specs` up as `launcher up` does once it has a plan: look, decide, check, act."""
    existing = [state for state in engine.list() if state.fleet == specs[0].fleet]
    engine.check_names([spec.name for spec in specs])
    if not recreate:
        started_with = {state.id: engine.environment(state.id) or {} for state in existing if state.live}
        check_fleet(specs, existing, started_with)
    changes = plan_changes(specs, existing, recreate=recreate)
    fleet.bring_up(engine, changes, settle_s=settle_s)
    return changes


def docker_engine(owner: int) -> Engine:
    """Return the Docker engine, or skip where there is none, or no image to run."""
    from launcher.engines.docker.docker import DockerEngine

    base_image()
    return DockerEngine(owner, ThisMachine())


@pytest.fixture(
    params=[
        "local",
        pytest.param("docker", marks=pytest.mark.docker),
        pytest.param("podman", marks=pytest.mark.podman),
    ]
)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """Return a world that holds nothing of anybody else's, and leaves nothing behind."""
    made = WORLDS[request.param](request, tmp_path)
    yield made
    for state in made.engine.list():
        made.engine.remove(state.id)


def _world(folder: Path, open_as: Callable[[Path, int], Engine]) -> World:
    # An owner of this test's own keeps parallel runs, and real fleets on this machine, out of sight.
    owner = 10**9 + uuid.uuid4().int % 10**8
    runs = folder / "runs"
    runs.mkdir()

    def reopen() -> Engine:
        return open_as(runs, owner)

    return World(reopen(), reopen, runs, f"test/{uuid.uuid4().hex[:8]}")


def docker_world(folder: Path) -> World:
    """Return a Docker world, or skip where there is no engine, or no image to run."""
    return _world(folder, lambda runs, owner: docker_engine(owner))


def podman_world(folder: Path, address: str) -> World:
    """Return a world of the Podman service at an address."""
    from launcher.engines.podman import PodmanEngine

    return _world(folder, lambda runs, owner: PodmanEngine(owner, ThisMachine({"DOCKER_HOST": address})))


WORLDS: dict[str, Callable[[pytest.FixtureRequest, Path], World]] = {
    "local": lambda request, folder: _world(folder, LocalEngine),
    "docker": lambda request, folder: docker_world(folder),
    "podman": lambda request, folder: podman_world(folder, request.getfixturevalue("podman").address),
}


@pytest.fixture
def clearml_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClearmlServerDouble]:
    """Start a double of ClearML's server, which this process and those it starts log to, and nowhere else."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", PYTHON_PATH)
    monkeypatch.setenv("CLEARML_CACHE_DIR", str(tmp_path / "clearml-cache"))
    with ClearmlServerDouble(tmp_path / "double") as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running
        assert running.unknown == set()


@pytest.fixture
def clearml_alone(runs: Path) -> None:
    """Turn the other trackers off."""
    from starling import settings

    settings.update({"mlflow": False, "tensorboard": False})
