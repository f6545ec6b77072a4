"""A real engine gives the same answers whether the standard library asks it or docker-py does."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from launcher.engines.docker.api import Api, Refused, SdkApi, SocketApi, request_target, socket_path
from launcher.hosts.reach import engine_address
from tests.contract.conftest import base_image
from tests.docker.conftest import docker, missing

pytestmark = pytest.mark.docker


@pytest.fixture
def ways(engine: None) -> Iterator[tuple[Api, Api]]:
    """Return both ways to the engine."""
    from docker import DockerClient

    path = socket_path(engine_address())
    if path is None:
        missing("the engine is not on this machine")
    assert path is not None
    client = DockerClient.from_env(version="1.41")
    yield SocketApi(path), SdkApi(lambda: client)
    client.close()


@pytest.fixture
def container() -> Iterator[str]:
    """Return the name of a container that sleeps."""
    name = f"test-api-{uuid.uuid4().hex[:8]}"
    made = docker("run", "-d", "--name", name, "--label", f"test={name}", base_image(), "sleep", "60")
    assert made.returncode == 0, made.stderr
    yield name
    docker("rm", "-f", name)


def test_both_ways_list_inspect_and_refuse_alike(ways: tuple[Api, Api], container: str) -> None:
    def told(path: str, **query: object) -> list[object]:
        return [way.ask("GET", request_target("1.41", path, query), 10).document() for way in ways]

    hellos = [way.ask("GET", "/_ping", 10) for way in ways]
    assert hellos[0].headers["api-version"] == hellos[1].headers["api-version"]
    listed = told("/containers/json", all=True, filters={"label": [f"test={container}"]})
    assert listed[0] == listed[1]
    assert len(listed) == 2
    inspected = told(f"/containers/{container}/json")
    assert inspected[0] == inspected[1]
    refusals = []
    for way in ways:
        with pytest.raises(Refused) as refused:
            way.ask("GET", request_target("1.41", "/containers/none-of-that-name/json", {}), 10).document()
        refusals.append((refused.value.status, str(refused.value), refused.value.vanished))
    assert refusals[0] == refusals[1]
    assert refusals[0][2]


@pytest.mark.parametrize("way", [0, 1])
def test_either_way_kills_and_removes(ways: tuple[Api, Api], container: str, way: int) -> None:
    api = ways[way]
    kill = request_target("1.41", f"/containers/{container}/kill", {"signal": "SIGKILL"})
    assert api.ask("POST", kill, 30).document() is None
    docker("wait", container)
    with pytest.raises(Refused) as again:
        api.ask("POST", kill, 30).document()
    assert again.value.status == 409
    remove = request_target("1.41", f"/containers/{container}", {"force": True, "v": True})
    assert api.ask("DELETE", remove, 30).status == 204
    with pytest.raises(Refused) as gone:
        api.ask("DELETE", remove, 30).document()
    assert gone.value.vanished
