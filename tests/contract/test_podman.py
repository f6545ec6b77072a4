"""What Podman does otherwise than Docker; all that is alike stands in the contract suite."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.devices.devices import Device
from launcher.errors import EngineError
from launcher.plan.dry_run import podman_run
from tests.conftest import PYTHON_PATH
from tests.contract.conftest import World, base_image, bring_up, podman_world
from tests.contract.test_engines import ended, run
from tests.podman import PodmanService

pytestmark = pytest.mark.podman

TELL_GPU = "import os; print(os.environ.get('GPU_DOUBLE'))"


@pytest.fixture
def world(podman: PodmanService, tmp_path: Path) -> World:
    return podman_world(tmp_path, podman.address)


@pytest.mark.parametrize("gpu", ["3", "GPU-5f2a7c11"])
def test_a_gpu_reaches_its_replica_by_cdi(world: World, gpu: str) -> None:
    replica_id = world.engine.create(world.spec(TELL_GPU, device=Device("gpu", gpu)))
    try:
        assert [(holder.id, holder.gpus) for holder in world.engine.gpu_holders()] == [(replica_id, (gpu,))]
        world.engine.start(replica_id)
        ended(world.engine, replica_id)
        assert list(world.engine.logs(replica_id)) == [gpu]
    finally:
        world.engine.remove(replica_id)


def test_a_gpu_that_podman_does_not_know_is_told_with_the_remedy_and_leaves_nothing(world: World) -> None:
    with pytest.raises(EngineError, match="nvidia-ctk cdi generate") as caught:
        bring_up(world.engine, [world.spec(TELL_GPU, device=Device("gpu", "9"))], settle_s=0)
    assert caught.value.exit_code == 5
    assert world.engine.list() == []


def test_a_line_written_in_pieces_is_one_line(world: World) -> None:
    code = "import sys, time\nfor word in ('one ', 'line', '\\n', 'rest'): sys.stdout.write(word); time.sleep(.1)"
    replica_id = run(world, code)
    try:
        ended(world.engine, replica_id)
        assert list(world.engine.logs(replica_id)) == ["one line", "rest"]
        assert list(world.engine.logs(replica_id, tail=1)) == ["rest"]
    finally:
        world.engine.remove(replica_id)


def test_the_line_that_a_dry_run_prints_makes_the_same_container(world: World, podman: PodmanService) -> None:
    spec = world.spec(TELL_GPU, device=Device("gpu", "3"))

    def by_engine() -> str:
        replica_id = world.engine.create(spec)
        world.engine.start(replica_id)
        return replica_id

    def by_line() -> str:
        return podman.podman(*shlex.split(podman_run(spec, 0))[1:]).stdout.strip()

    made = []
    for make in (by_line, by_engine):
        container = make()
        assert podman.docker("wait", container).stdout == "0\n"
        assert podman.docker("logs", container).stdout == "3\n"
        made.append(json.loads(podman.docker("inspect", container).stdout)[0])
        podman.docker("rm", "-f", container)
    hosts = [seen["HostConfig"] for seen in made]
    for host in hosts:
        host["Binds"] = [sorted(bind.replace(":", ",").split(",")) for bind in host["Binds"]]
    assert hosts[0] == hosts[1]


def test_the_log_has_a_bound(world: World) -> None:
    replica_id = world.engine.create(world.spec("pass"))
    api = world.engine._to.client  # type: ignore[attr-defined]
    inspected = api.get(f"{api.base_url}/v4.0.0/libpod/containers/{replica_id}/json").json()
    world.engine.remove(replica_id)
    assert inspected["HostConfig"]["LogConfig"]["Size"] == "31.46MB"


def launcher(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": PYTHON_PATH, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_docker_host_that_leads_to_podman_is_taken_for_what_it_is(
    podman: PodmanService, tmp_path: Path
) -> None:
    words = ("up", "--dry-run", "--cpu", "1", "--image", base_image(), "--", "--name", "x")
    for engine, variable in (("docker", "DOCKER_HOST"), ("podman", "CONTAINER_HOST")):
        done = launcher(tmp_path, *words, STARLING_ENGINE=engine, **{variable: podman.address})
        assert done.returncode == 5, done.stderr
        assert done.stdout.count("would fail now: ") == 1, (
            "but for the want of a trainer in this image all is well"
        )
        assert "on the podman engine" in done.stdout
        assert "\npodman run --detach --name" in done.stdout


def test_an_image_that_is_not_there_is_built_or_brought_over_by_podmans_own_commands(
    world: World, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=r"podman build -t none:x .*docker save none:x \| podman load"):
        world.engine.resolve_image("none:x")
    done = launcher(tmp_path, "up", "--engine", "podman", "--build", "--image", "none:x", "--", "--name", "x")
    assert done.returncode == 2
    assert "podman build -t none:x" in done.stderr


@pytest.mark.docker
def test_a_docker_socket_is_not_taken_for_podmans(tmp_path: Path) -> None:
    base_image()
    address = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    done = launcher(tmp_path, "status", "--engine", "podman", CONTAINER_HOST=address)
    assert done.returncode == 5
    assert "--engine docker" in done.stderr


@pytest.mark.parametrize("listens", [False, True])
def test_a_podman_that_does_not_answer_is_told_with_the_remedy_in_time(tmp_path: Path, listens: bool) -> None:
    address = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as hung:
        if listens:
            hung.bind(str(address))
            hung.listen()
        began = time.monotonic()
        done = launcher(tmp_path, "status", "--engine", "podman", CONTAINER_HOST=f"unix://{address}")
        took = time.monotonic() - began
    assert done.returncode == 5
    reason = "no answer within 3 s" if listens else f"no socket at {address}"
    assert f"Podman does not answer ({reason})" in done.stderr
    assert "podman.socket" in done.stderr
    assert took < 10
