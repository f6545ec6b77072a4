"""The main job as users run it, small, on every engine: real trainers, one search, tracked as one."""

from __future__ import annotations

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

from tests.conftest import REPOSITORY, TINY_LAYOUT
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
        "PYTHONPATH": str(REPOSITORY),
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


def wait_until_finished(home: Path, fleet: str, engine: str) -> list[dict[str, object]]:
    for _ in range(120):
        replicas = json.loads(launcher(home, "status", "--json", fleet, engine=engine).stdout)["replicas"]
        if all(replica["phase"] == "exited" for replica in replicas):
            return list(replicas)
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
