"""`launcher up --build`: build the trainer's image from the project's folder."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from launcher.errors import EngineError
from starling.core.errors import UsageError

BUILDER = Path("scripts/image")


def build_image(tag: str, start: Path, environment: Mapping[str, str]) -> None:
    """Run the project's build script for `tag`, and show its output to the user.

    `environment` selects the engine for Docker's client. The script names its base image before it pulls one. Raises
    UsageError if neither this package's folder nor `start` nor a folder above it is a project; EngineError if the build
    fails.
    """
    project = project_folder(start)
    if shutil.which("docker") is None:
        raise UsageError(
            "--build: needs Docker's own client (Debian: apt-get install docker-cli); or build elsewhere"
        )
    done = subprocess.run(
        [str(project / BUILDER), "trainer", tag], env=environment, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        raise EngineError(f"--build: {project / BUILDER} could not build {tag}; its last lines say why")


def project_folder(start: Path) -> Path:
    """Return the folder with the Dockerfile: this package's, else the nearest one from `start` upwards."""
    for folder in (Path(__file__).resolve().parents[2], start, *start.parents):
        if (folder / BUILDER).is_file() and (folder / "Dockerfile").is_file():
            return folder
    raise UsageError(
        f"--build: no {BUILDER} at or above {start}; run it in the project's folder, or build there: {BUILDER} trainer TAG"
    )
