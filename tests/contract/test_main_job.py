"""The main job as users run it, small, on every engine: real trainers, one search, tracked as one."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import PYTHON_PATH, TINY_LAYOUT
from tests.contract.conftest import docker_engine
from tests.docker.conftest import TRAINER, require_images

pytestmark = pytest.mark.slow

TRAINING = ["--data", "bccd.yaml", "--weights", "", "--cfg", "tiny.yaml", "--img", "64", "--epochs", "1"]


@pytest.fixture(params=["local", pytest.param("docker", marks=pytest.mark.docker)])
def engine(request: pytest.FixtureRequest) -> str:
    """Name one engine after the other."""
    return str(request.param)


@pytest.fixture
def image(engine: str) -> list[str]:
    """Return what `up` needs to find the image, where there is one."""
    if engine != "docker":
        return []
    docker_engine(0)  # skips, or fails, where no engine answers
    require_images([TRAINER])
    return ["--image", TRAINER]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a folder like a user's, with a runs folder of its own and a layout of its own."""
    (tmp_path / "runs").mkdir()
    shutil.copyfile(TINY_LAYOUT, tmp_path / "tiny.yaml")
    return tmp_path


def launcher(home: Path, *words: str, engine: str) -> subprocess.CompletedProcess[str]:
    variables = {
        "PYTHONPATH": PYTHON_PATH,
        "STARLING_RUNS": str(home / "runs"),
        "STARLING_ENGINE": engine,
    }
    return subprocess.run(
        [sys.executable, "-m", "launcher", *words],
        cwd=home,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def fleet(home: Path, engine: str) -> Iterator[str]:
    name = f"blood/{uuid.uuid4().hex[:8]}"
    yield name
    launcher(home, "kill-all", "--yes", name, engine=engine)


def replicas_of(home: Path, fleet: str, engine: str) -> list[dict[str, object]]:
    told: list[dict[str, object]] = json.loads(
        launcher(home, "status", "--json", fleet, engine=engine).stdout
    )["replicas"]
    return told


def wait_until_finished(home: Path, fleet: str, engine: str) -> list[dict[str, object]]:
    for _ in range(120):
        replicas = replicas_of(home, fleet, engine)
        if all(replica["phase"] == "exited" for replica in replicas):
            return replicas
        time.sleep(1)
    raise AssertionError(launcher(home, "logs", fleet, engine=engine).stdout)


def test_two_replicas_share_a_search_that_is_tracked_as_one(
    engine: str, image: list[str], home: Path, fleet: str
) -> None:
    up = launcher(
        home, "up", "--cpu", "2", "--memory", "3g", *image, "--", *TRAINING,
        "--project", "blood", "--name", fleet.split("/")[1], "--evolve", "3", engine=engine,
    )  # fmt: skip
    assert up.returncode == 0, up.stderr
    replicas = wait_until_finished(home, fleet, engine)
    assert [replica["exit_code"] for replica in replicas] == [0, 0], launcher(
        home, "logs", fleet, engine=engine
    )
    assert {replica["finished"] for replica in replicas} == {3}
    (told,) = json.loads(launcher(home, "status", "--json", fleet, engine=engine).stdout)["searches"]
    assert (told["fleet"], told["finished"], told["budget"]) == (fleet, 3, 3)
    assert told["best_fitness"] == replicas[0]["best_fitness"]

    search = home / "runs" / fleet
    with open(search / "evolve.csv") as file:
        assert len(list(csv.DictReader(file))) == 3
    assert (search / "weights" / "best.pt").is_file()
    with sqlite3.connect(home / "runs" / "mlflow" / "mlflow.db") as database:
        runs = database.execute("select count(*) from runs").fetchone()[0]
        parents = database.execute(
            "select count(distinct value), count(*) from tags where key = 'mlflow.parentRunId'"
        ).fetchone()
    assert runs == 4, "the search and its three candidates"
    assert parents == (1, 3)

    assert launcher(home, "kill-all", "--yes", fleet, engine=engine).returncode == 0
    assert "no such replica or fleet" in launcher(home, "status", fleet, engine=engine).stderr


def test_one_training_on_two_devices_is_one_replica_that_saves_when_it_is_stopped(
    engine: str, image: list[str], home: Path, fleet: str
) -> None:
    project, name = fleet.split("/")
    (home / "runs" / "settings.json").write_text(
        '{"mlflow": false}'
    )  # tracked trainings are the other test's
    options = ["up", "--cpu", "2", "--ddp", "--memory", "1536m", *image]
    training = [*TRAINING[:-1], "500", "--noplots", "--project", project, "--name", name]
    up = launcher(home, *options, "--", *training, engine=engine)
    assert up.returncode == 0, up.stderr
    for _ in range(240):
        [replica] = replicas_of(home, fleet, engine)
        if int(str(replica["epoch"] or 0)) > 1 or replica["phase"] == "exited":
            break
        time.sleep(0.5)
    assert replica["phase"] == "running", launcher(home, "logs", fleet, engine=engine).stdout
    assert replica["replica"] == f"{project}-{name}-cpu0-1"
    assert replica["device"] == "cpu:0-1"
    if engine == "docker":
        assert replica["memory_bytes"] == 3 << 30, "the sum of both devices' shares"

    assert launcher(home, "stop", fleet, engine=engine).returncode == 0
    [replica] = replicas_of(home, fleet, engine)
    output = launcher(home, "logs", fleet, engine=engine).stdout
    assert (replica["state"], replica["exit_code"]) == ("stopped 143: resumable", 143), output
    assert "2 processes" in output
    assert not _processes_about(home), "no rank outlives the others"
    run = home / "runs" / fleet
    with open(run / "results.csv") as file:
        assert len(list(csv.DictReader(file))) >= 1
    assert (run / "weights" / "last.pt").is_file()


def _processes_about(home: Path) -> list[str]:
    """Return the processes of this machine whose command names the folder."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                command = (folder / "cmdline").read_bytes()
                if os.fsencode(home) in command and b"train.py" in command:
                    found.append(os.fsdecode(command))
    return found
