"""A stand-in for the trainer, under the real supervisor: what the launcher's own tests start."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.conftest import REPOSITORY

APP = "/usr/src/app"


def write_double(app: Path, trainer: str) -> None:
    """Make an `app` package in which `train.py` is `trainer`, and of the rest what a supervisor needs."""
    app.mkdir(parents=True)
    (app / "train.py").write_text(trainer)
    for name in ("__init__.py", "supervise.py", "errors.py"):
        shutil.copy(REPOSITORY / "app" / name, app / name)
    for folder in ("core", "outputs"):
        (app / folder).mkdir()
        for path in (REPOSITORY / "app" / folder).glob("*.py"):
            shutil.copy(path, app / folder / path.name)


def build_double(folder: Path, base: str, tag: str, trainer: str, address: str | None = None) -> None:
    """Build the image `tag` whose train.py is `trainer`, on the engine at `address` [the usual one]."""
    write_double(folder / "app", trainer)
    python = folder / "python"
    python.write_text('#!/bin/sh\nexec python3 "$@"\n')
    python.chmod(0o755)
    # Without RUN, which a private engine without a network could not do.
    (folder / "Dockerfile").write_text(f"FROM {base}\nCOPY python /usr/local/bin/\nCOPY app {APP}\n")
    engine = {} if address is None else {"DOCKER_HOST": address}
    subprocess.run(
        ["docker", "build", "-q", "-t", tag, str(folder)],
        check=True,
        capture_output=True,
        env={**os.environ, "DOCKER_BUILDKIT": "0", **engine},
    )
