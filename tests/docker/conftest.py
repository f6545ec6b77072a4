"""What the Docker tests share: an engine that answers, the images, and one way to run a command in a container.

Images come from `scripts/test`, or from `scripts/image TARGET TAG` by hand; STARLING_TEST_IMAGE names another trainer's
image. Where something is missing a test is skipped, unless STARLING_REQUIRE_DOCKER=1 says that it must not be.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TRAINER, MLFLOW, AGENT, POSTGRES = (
    os.environ.get("STARLING_TEST_IMAGE", "starling:test"),
    "starling-mlflow:test",
    "starling-clearml-agent:test",
    "starling-postgres:test",
)


def docker(*words: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Run the docker client and return what it said, whatever its exit code."""
    return subprocess.run(["docker", *words], capture_output=True, text=True, timeout=timeout_s, check=False)


def missing(what: str) -> None:
    """Skip the test for want of `what`, or fail it where Docker tests are required."""
    if os.environ.get("STARLING_REQUIRE_DOCKER") == "1":
        pytest.fail(f"STARLING_REQUIRE_DOCKER=1, but {what}")
    pytest.skip(what)


@pytest.fixture(scope="session")
def engine() -> None:
    """Ask for a Docker engine that answers."""
    try:
        answer = docker("info", "--format", "{{.ServerVersion}}", timeout_s=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        missing(f"no Docker engine answers: {error}")
    else:
        if answer.returncode:
            missing(f"no Docker engine answers: {answer.stderr.strip()}")


def require_images(names: Sequence[str]) -> None:
    """Skip or fail unless the engine has all of these images."""
    for name in names:
        if docker("image", "inspect", name).returncode:
            missing(f"there is no image {name}; scripts/test builds it")


@pytest.fixture(scope="session")
def trainer_image(engine: None) -> str:
    """Return the name of the built trainer's image."""
    require_images([TRAINER])
    return TRAINER
