"""Which machine a command means, and that two of them do not get in each other's way."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.engines.docker.docker import DockerEngine
from launcher.engines.opening import find_host
from launcher.errors import EngineError
from launcher.hosts.address import is_behind_ssh, podman_address
from launcher.hosts.ssh_host import SshHost
from launcher.hosts.this_machine import TcpHost, ThisMachine
from tests.doubles.docker_engine import EngineDouble, served

NOWHERE = {"DOCKER_CONFIG": "/nowhere"}
"""An environment in which no Docker context is chosen."""


@pytest.mark.parametrize(
    ("environment", "given", "address"),
    [
        ({}, None, "unix:///var/run/docker.sock"),
        ({"DOCKER_HOST": "unix:///a"}, None, "unix:///a"),
        ({"DOCKER_HOST": "unix:///a"}, "unix:///b", "unix:///b"),
        ({"DOCKER_HOST": "tcp://a:1"}, "unix:///b", "unix:///b"),
    ],
)
def test_an_address_that_is_given_wins_over_variables_and_changes_none(
    environment: Mapping[str, str], given: str | None, address: str
) -> None:
    before = dict(os.environ)
    host = find_host("docker", given, {**NOWHERE, **environment})
    assert (host.engine_address, host.remote, host.address) == (address, False, "")
    assert host.environment.get("DOCKER_HOST", "unix:///var/run/docker.sock") == address
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("environment", "given", "address"),
    [
        ({}, None, "unix:///run/podman/podman.sock"),
        ({"DOCKER_HOST": "unix:///a"}, None, "unix:///a"),
        ({"DOCKER_HOST": "unix:///a", "CONTAINER_HOST": "unix:///b"}, None, "unix:///b"),
        ({"CONTAINER_HOST": "unix:///b"}, "unix:///c", "unix:///c"),
    ],
)
def test_podmans_address_is_the_flags_then_its_own_variables_then_dockers(
    environment: Mapping[str, str], given: str | None, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getuid", lambda: 0)
    assert find_host("podman", given, environment).engine_address == address


def test_a_user_without_root_has_a_podman_of_their_own() -> None:
    assert podman_address({}, 1000) == "unix:///run/user/1000/podman/podman.sock"
    assert podman_address({"XDG_RUNTIME_DIR": "/x"}, 1000) == "unix:///x/podman/podman.sock"


def test_a_machine_behind_tcp_is_another_one_with_this_machines_files(tmp_path: Path) -> None:
    host = find_host("docker", "tcp://127.0.0.1:1", NOWHERE)
    assert isinstance(host, TcpHost)
    assert (host.remote, host.gpus(), host.driver(), host.usage({"x": os.getpid()})) == (True, None, None, {})
    assert host.read_status([tmp_path / "a/b"], 10) is None
    assert host.files.is_dir(tmp_path)
    assert host.owner_of(tmp_path) == os.getuid()


def test_processes_run_on_this_machine_whatever_the_variables_say() -> None:
    assert not find_host("local", None, {"DOCKER_HOST": "tcp://far:1"}).remote


def test_a_docker_context_that_does_not_exist_is_refused() -> None:
    with pytest.raises(EngineError, match="Docker context gone: does not exist"):
        find_host("docker", None, {**NOWHERE, "DOCKER_CONTEXT": "gone"})


def test_ssh_is_seen_without_a_connection() -> None:
    assert is_behind_ssh("ssh://a", NOWHERE)
    assert is_behind_ssh(None, {"DOCKER_HOST": "ssh://a"})
    assert not is_behind_ssh("unix:///a", {"DOCKER_HOST": "ssh://a"})


class Connection:
    """A double of a connection by ssh, of which only the particulars are asked."""

    url, name, ids, home = "ssh://root@machine:22", "machine", (1001, 100), Path("/home/me")
    docker_socket = Path("/tmp/starling-ssh-x/docker.sock")


def test_behind_ssh_the_engine_is_reached_by_the_socket_here_and_by_nothing_else() -> None:
    connection: Any = Connection()
    other = {
        "DOCKER_CONTEXT": "x",
        "DOCKER_TLS_VERIFY": "1",
        "DOCKER_CERT_PATH": "/c",
        "DOCKER_HOST": "ssh://x",
    }
    host = SshHost(connection, {**other, "LANG": "C"})
    assert host.environment == {"LANG": "C", "DOCKER_HOST": "unix:///tmp/starling-ssh-x/docker.sock"}
    assert host.engine_address == host.environment["DOCKER_HOST"]
    assert (host.address, host.remote, host.uid, host.owner) == ("ssh://root@machine:22", True, 1001, 1001)
    assert host.files.start == Path("/home/me")


class Engine(EngineDouble):
    """An engine without containers."""

    def content(self) -> tuple[int, bytes]:
        return 200, b"[]" if "containers" in self.path else b"OK"


class Refusing(Engine):
    """An engine that lists nothing."""

    def content(self) -> tuple[int, bytes]:
        return (500, b'{"message": "the other one"}') if "containers" in self.path else (200, b"OK")


def test_two_engines_of_one_process_are_each_asked_at_their_own_address() -> None:
    with served(Engine) as one, served(Refusing) as other:
        first, second = (
            DockerEngine(7, ThisMachine({"DOCKER_HOST": f"unix://{path}"})) for path in (one, other)
        )
        assert first.list() == []
        with pytest.raises(EngineError, match="the other one"):
            second.list()
