"""`launcher up --build`: make the trainer's image from the project's folder, with a line a step."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from launcher.errors import EngineError
from starling.core.errors import UsageError

BUILDER = Path("scripts/image")


def build_image(tag: str, start: Path, environment: Mapping[str, str]) -> None:
    """Run the project's own build script for `tag`; its output is the user's to see.

    `environment` leads Docker's client to the engine. The script names its base image before it pulls one. Raises UsageError where there is no project
    folder at or above `start`, nor around this package; EngineError when the build fails.
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
    """Return the folder with the Dockerfile: the package's own, else the nearest at or above `start`."""
    for folder in (Path(__file__).resolve().parents[2], start, *start.parents):
        if (folder / BUILDER).is_file() and (folder / "Dockerfile").is_file():
            return folder
    raise UsageError(
        f"--build: no {BUILDER} at or above {start}; run it in the project's folder, or build there: {BUILDER} trainer TAG"
    )
