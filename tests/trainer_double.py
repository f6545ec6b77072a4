"""A stand-in for the trainer, under the real supervisor: what the launcher's own tests start."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.conftest import REPOSITORY

APP = "/usr/src/app"
RUN_TRAINER = """import runpy, sys
from pathlib import Path

del sys.argv[1]
runpy.run_path(str(Path(__file__).parents[1] / "train.py"), run_name="__main__")
"""


def write_double(app: Path, trainer: str) -> None:
    """Make a folder as `app/` in which `train.py`, and `starling train`, are `trainer`; of the rest, what a supervisor needs."""
    package = app / "starling"
    for room in ("core", "outputs"):
        shutil.copytree(
            REPOSITORY / "app" / "starling" / room,
            package / room,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for name in ("supervise.py", "starling/__init__.py", "starling/supervise.py", "starling/errors.py"):
        shutil.copy(REPOSITORY / "app" / name, app / name)
    (app / "train.py").write_text(trainer)
    (package / "__main__.py").write_text(RUN_TRAINER)


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
