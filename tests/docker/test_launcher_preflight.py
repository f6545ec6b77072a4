"""`up` on a real engine: refused before anything starts, whole or not at all, and typed by hand to the same effect."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.devices.devices import Device
from launcher.engines.docker.docker import DockerEngine
from launcher.errors import EngineError
from launcher.plan.dry_run import docker_run
from tests.conftest import REPOSITORY
from tests.contract.conftest import World, base_image, bring_up, docker_engine
from tests.contract.test_engines import SLEEP
from tests.docker.test_launcher_docker import Cli, cli, docker, world
from tests.trainer_double import write_double

__all__ = ["cli", "world"]  # fixtures

pytestmark = pytest.mark.docker

DOCKERFILE = """
ARG BASE
FROM ${BASE}
RUN mkdir -p /usr/src/app/runs && ln -sf python3 /usr/bin/python
COPY double /usr/src/app/
LABEL starling.trainer=1 starling.cuda=13.0
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This launcher and its build script, in a project whose trainer only sleeps."""
    docker_engine(0)  # skips where there is no engine, or no base image
    folder = tmp_path_factory.mktemp("project")
    for name in ("launcher", "scripts"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "deploy" / "ca").mkdir(parents=True)
    (folder / "Dockerfile").write_text(DOCKERFILE)
    write_double(folder / "double", "import time; print('up', flush=True); time.sleep(120)\n")
    return folder


def up_build(project: Path, cli: Cli, tag: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `up --build` of the launcher in that project."""
    options = ("--cpu", "1", "--memory", "128m", "--image", tag, *words)
    return subprocess.run(
        [sys.executable, "-m", "launcher", "up", "--build", *options, "--", "--project", "test", "--name", cli.name],
        cwd=cli.folder,
        env={**os.environ, "PYTHONPATH": str(project), "BASE": base_image(), "DOCKER_BUILDKIT": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def image(project: Path) -> Iterator[str]:
    """The sleeping trainer's image, made by the project's own script."""
    tag = f"starling-preflight-test:{uuid.uuid4().hex[:8]}"
    subprocess.run(
        [project / "scripts/image", "trainer", tag],
        env={**os.environ, "BASE": base_image(), "DOCKER_BUILDKIT": "0"},
        check=True,
        capture_output=True,
    )
    yield tag
    docker("rmi", "-f", tag)


def nothing_is_left(cli: Cli) -> bool:
    strays = docker("ps", "-aq", "--filter", f"ancestor={cli.image}").split()
    return not (cli.containers() or strays or (cli.folder / "runs").exists())


# --- refused before anything starts


def test_an_image_without_our_trainer_is_refused_and_nothing_is_left(cli: Cli) -> None:
    bare = Cli(cli.folder, f"starling-bare:{cli.name}")
    # An image of its own: containers of others from the base are none of this test's business.
    text = f"FROM {base_image()}\nLABEL test={cli.name}\n"
    subprocess.run(
        ["docker", "build", "-q", "-t", bare.image, "-"],
        input=text,
        text=True,
        check=True,
        capture_output=True,
    )
    try:
        done = bare.up("--cpu", "1")
        assert nothing_is_left(bare)
    finally:
        docker("rmi", "-f", bare.image)
    assert done.returncode == 5
    assert (
        f"image {bare.image} is not one of this trainer's: it has no /usr/src/app/supervise.py" in done.stderr
    )


def test_all_that_is_wrong_is_told_at_once_and_nothing_is_left(cli: Cli) -> None:
    data = cli.folder / "blood"
    (data / "images").mkdir(parents=True)
    (data / "blood.yaml").write_text("train: images\nval: images\nnames: [a]\n")
    data.chmod(0o700)
    there, cli.image = cli.image, "starling-no-such-image"
    done = cli.up(
        "--cpu", "1", "--network", "gone", "--user", "12345:12345", training=("--data", "blood/blood.yaml")
    )
    cli.image = there
    assert done.returncode == 3, "the user's file says more than a flag or the engine"
    for words in (
        "3 problems; nothing was started",
        "no image starling-no-such-image",
        "--network gone: no such network",
    ):
        assert words in done.stderr
    assert f"{data}: replicas run as 12345:12345 and may not read it" in done.stderr
    assert nothing_is_left(cli)


def test_a_dry_run_shows_the_plan_with_what_would_be_wrong_and_what_would_be_built(cli: Cli) -> None:
    there, cli.image = cli.image, "starling-no-such-image"
    wrong = cli.up("--cpu", "1", "--network", "gone", "--dry-run")
    build = cli.up("--cpu", "1", "--build", "--dry-run")
    cli.image = there
    assert (wrong.returncode, build.returncode) == (5, 0)
    assert "\nwould fail now: no image starling-no-such-image here" in wrong.stdout
    assert "\nwould fail now: --network gone: no such network" in wrong.stdout
    assert "note: starling-no-such-image would be built first" in build.stdout
    assert "would fail now" not in build.stdout
    assert nothing_is_left(cli)


def test_the_lack_of_a_gpu_runtime_is_found_before_anything_is_made(cli: Cli) -> None:
    if _has_gpu_runtime():
        pytest.skip("this machine's engine has a GPU runtime")
    done = cli.up("--gpus", "0-2")
    assert done.returncode == 5
    assert "Docker has no GPU runtime; install the NVIDIA container toolkit" in done.stderr
    assert done.stdout == ""
    assert nothing_is_left(cli)


# --- whole, or not at all


def test_a_third_start_that_the_engine_refuses_takes_back_the_running_and_the_created(
    world: World, said: list[str]
) -> None:
    """The third and the fourth ask for a GPU, which this machine's engine cannot give them."""
    gpus = {"c": Device("gpu", "0"), "d": Device("gpu", "1")}
    specs = [world.spec(SLEEP, name, device=gpus.get(name, Device("cpu", "0"))) for name in "abcd"]
    if _has_gpu_runtime():
        pytest.skip("this machine's engine has a GPU runtime")
    with pytest.raises(EngineError) as caught:
        bring_up(world.engine, specs)
    alike = f"{specs[2].name} (GPU 0), {specs[3].name} (GPU 1): Docker has no GPU runtime; install the NVIDIA"
    assert str(caught.value).startswith(alike), "replicas that fail alike are told in one line"
    assert said == ["rolled back: 4 replicas removed, nothing is left behind"]
    assert world.reopen().list() == []


def _has_gpu_runtime() -> bool:
    try:
        docker_engine(0).check_gpu_runtime(docker_engine(0).resolve_image(base_image()))
    except EngineError:
        return False
    return True


# --- typed by hand


def comparable(name: str) -> dict[str, Any]:
    """Return what makes a container what it is: no id of its own, and no difference between empty and absent."""
    [inspected] = json.loads(docker("inspect", name))
    config, host = inspected["Config"], inspected["HostConfig"]
    config["Env"] = dict(item.split("=", 1) for item in config["Env"])  # of two of a name the later counts
    for asked in host["DeviceRequests"] or []:
        asked["Capabilities"] = [sorted(names) for names in asked["Capabilities"]]
    if config["Hostname"] == inspected["Id"][:12]:
        del config["Hostname"]
    if host["RestartPolicy"].get("Name") == "no":  # the client's word for the engine's nothing
        host["RestartPolicy"]["Name"] = ""
    host.pop("ConsoleSize", None)  # of the terminal it was typed in
    return {
        part: {key: value for key, value in values.items() if value not in (None, [], {}, "")}
        for part, values in (("Config", config), ("HostConfig", host))
    }


def test_the_lines_of_a_dry_run_make_the_very_containers_that_up_makes(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_RUN", "it's mine")
    monkeypatch.setenv("TOKEN", "s3cret")
    monkeypatch.setenv("OTHER", "from the shell")
    monkeypatch.setenv("CLEARML_CONFIG_FILE", "clearml.conf")
    (cli.folder / "clearml.conf").write_text("api.credentials.secret_key = hunter2\n")
    (cli.folder / "some variables").write_text("FILED=two words\nTOKEN\nOTHER=from the file\n")
    (cli.folder / "a,b").mkdir()
    (cli.folder / "a,b" / "d.yaml").write_text("train: .\nval: .\nnames: [a]\n")
    options = ("--cpu", "1", "--env-file", "some variables", "--env", "OTHER")
    training = ("--data", "a,b/d.yaml", "--single-cls", "--weights", "")

    plan = cli.up(*options, "--dry-run", training=training).stdout
    assert "s3cret" not in plan
    assert "hunter2" not in plan
    assert "from the shell" not in plan
    lines = [line for line in plan.splitlines() if line.startswith(("docker run", "install", "chown"))]
    typed = subprocess.run(
        ["bash", "-ec", "\n".join(lines)], cwd="/", capture_output=True, text=True, check=False
    )
    assert typed.returncode == 0, typed.stderr
    by_hand = comparable(cli.replica)

    report = json.loads(cli("status", "--json", cli.fleet).stdout)
    assert [(row["replica"], row["state"]) for row in report["replicas"]] == [(cli.replica, "running")]
    again = cli.up(*options, training=training)
    assert f"already running: {cli.replica}" in again.stdout, again.stderr

    assert cli("kill-all", "--yes", cli.fleet).returncode == 0
    made = cli.up(*options, training=training)
    assert f"started {cli.replica}" in made.stdout, made.stderr
    assert comparable(cli.replica) == by_hand
    passed = {"TOKEN": "s3cret", "OTHER": "from the shell", "FILED": "two words", "MLFLOW_RUN": "it's mine"}
    assert passed.items() <= by_hand["Config"]["Env"].items()
    look = 'cat "$CLEARML_CONFIG_FILE"; test -w "$CLEARML_CONFIG_FILE" || echo kept'
    seen = docker("exec", cli.replica, "sh", "-c", look)
    assert seen.splitlines() == ["api.credentials.secret_key = hunter2", "kept"]
    assert "hunter2" not in docker("inspect", cli.replica)


def test_a_gpu_replica_typed_by_hand_asks_for_the_same_device(world: World) -> None:
    spec = replace(world.spec(SLEEP), device=Device("gpu", "3"), network="bridge")
    assert isinstance(world.engine, DockerEngine)
    made = world.engine.create(spec)
    by_launcher = comparable(made)["HostConfig"]
    world.engine.remove(made)
    # Created and not started: this machine may have no GPU runtime.
    words = shlex.split(docker_run(spec, world.engine._owner))
    assert words[:3] == ["docker", "run", "--detach"]
    typed = docker("create", *words[3:])
    assert comparable(typed)["HostConfig"] == by_launcher
    assert [state.name for state in world.engine.list()] == [spec.name]


# --- the image


def test_build_makes_the_image_first_with_a_whole_line_a_step(project: Path, cli: Cli) -> None:
    tag = f"starling-preflight-test:{cli.name}"
    try:
        done = up_build(project, cli, tag)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert f"image {tag} on {base_image()}" in lines[0]
        assert any(f"image {tag} is ready" in line for line in lines)
        assert f"started {cli.replica} on CPU 0" in lines
        assert "\r" not in done.stdout
        [inspected] = json.loads(docker("inspect", cli.replica))
        assert inspected["Config"]["Labels"]["starling.trainer"] == "1"
    finally:
        docker("rm", "-f", *cli.containers())
        docker("rmi", "-f", tag)


def test_a_build_that_fails_shows_its_last_lines_and_starts_nothing(project: Path, cli: Cli) -> None:
    (project / "Dockerfile").write_text(DOCKERFILE + "RUN echo the reason >&2; exit 7\n")
    try:
        done = up_build(project, cli, f"starling-preflight-test:{cli.name}")
    finally:
        (project / "Dockerfile").write_text(DOCKERFILE)
    assert done.returncode == 5
    assert "the reason" in done.stderr
    assert "--build: " in done.stderr
    assert nothing_is_left(cli)
