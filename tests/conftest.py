"""What every test shares: a small real dataset, a tiny layout, and a runs folder of its own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

# Before torch is imported: tests are many and small, threads only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# pytest-xdist's workers ignore Ctrl-C, and so would all that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from starling.core.log_lines import lines_to
from tests.podman import PodmanService, require_podman
from tests.postgres import PostgresServer, find_programs, missing

REPOSITORY = Path(__file__).resolve().parent.parent
PYTHON_PATH = f"{REPOSITORY / 'app'}:{REPOSITORY}"
"""Where a process of this checkout finds both packages, whatever is installed."""
MINI_SET = REPOSITORY / "datasets" / "bccd-mini"
TINY_LAYOUT = Path(__file__).resolve().parent / "tiny.yaml"
CELL_DETECTOR = Path(__file__).resolve().parent / "detector" / "cells.pt"
"""Weights that find blood cells; detector/README.md says how they were trained."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Say which tests run one after the other when several run at once (`pytest -n 2`).

    Those that start replicas do, since an `up` waits for any other on the machine, and what an engine does for two tests
    at once takes each longer. So do those of a file, and what they share is made once.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "replicas" if _starts_replicas(REPOSITORY / file) else file

    return ByFile(config, log)


@cache
def _starts_replicas(file: Path) -> bool:
    marks = re.search(r"mark\.(docker|podman)|\bWorld\b", file.read_text(encoding="utf-8"))
    return file.name.startswith("test_launcher") or marks is not None


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test a runs folder of its own, and no tracking server or settings from outside."""
    folder = tmp_path / "runs"
    monkeypatch.setenv("STARLING_RUNS", str(folder))
    for name in list(os.environ):
        if name.startswith(
            (
                "MLFLOW_",
                "CLEARML_",
                "STARLING_CLEARML_TASK",
                "STARLING_REPLICA",
                "STARLING_FLEET",
                "STARLING_STUDY",
                "PGPASS",
            )
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CLEARML_CONFIG_FILE", str(tmp_path / "no-clearml.conf"))
    return folder


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Return the lines that both packages log for people meanwhile; a command has them on its console."""
    lines: list[str] = []
    with lines_to(lines.append):
        yield lines


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """Start a PostgreSQL server for the tests that need one."""
    programs = find_programs()
    if programs is None:
        missing("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    assert programs is not None
    server = PostgresServer(programs)
    yield server
    server.remove()


@pytest.fixture
def database(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of an empty database; its password is in the environment."""
    monkeypatch.setenv("PGPASSWORD", postgres.password)
    return postgres.create_database(f"test_{uuid.uuid4().hex[:12]}")


@pytest.fixture(scope="session")
def podman() -> Iterator[PodmanService]:
    """Start a Podman service that has the base image."""
    from tests.contract.conftest import base_image

    require_podman()
    service = PodmanService(base_image())
    yield service
    service.remove()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the YAML of eight real images to train on and four to validate on."""
    root = tmp_path_factory.mktemp("tiny")
    for split, count in (("train", 8), ("val", 4)):
        for image in sorted((MINI_SET / "images" / split).glob("*.jpg"))[:count]:
            for kind, suffix in (("images", ".jpg"), ("labels", ".txt")):
                target = root / kind / split / f"{image.stem}{suffix}"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(MINI_SET / kind / split / target.name, target)
    shutil.copyfile(MINI_SET / "bccd.yaml", root / "bccd.yaml")
    return root / "bccd.yaml"


@pytest.fixture
def tiny_args(tiny_data: Path) -> list[str]:
    """Return the flags of a training that takes about a second."""
    return ["--data", str(tiny_data), "--weights", "", "--cfg", str(TINY_LAYOUT), "--img", "64", "--batch", "4",
            "--epochs", "2", "--device", "cpu"]  # fmt: skip
