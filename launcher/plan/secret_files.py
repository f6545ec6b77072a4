"""Files with secrets that the user's variables name: replicas are shown them, read-only, and nobody here reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from launcher.engines.base import Mount
from launcher.hosts.files import LOCAL, HostFiles
from launcher.plan.plan import Request
from starling.core.errors import UsageError

PASSWORD_FILES = ("STARLING_STUDY_PASSWORD_FILE", "MLFLOW_TRACKING_PASSWORD_FILE")
"""Variables that name a file with a password, which replicas find at its own path."""

CLEARML_FILE = "CLEARML_CONFIG_FILE"
"""Names the file with ClearML's keys that `clearml-init` writes."""


def with_secret_files(request: Request, files: HostFiles = LOCAL) -> Request:
    """Return the request for replicas that see only what is mounted, with the files that its variables name.

    A file of ClearML's that is not there stays a mere variable: it means no configuration inside as it does here. Raises
    UsageError for a password's file that is not there.
    """
    passed, settings = dict(request.passed), dict(request.settings)
    if named := passed.get(CLEARML_FILE):
        path = files.expand(files.start, named)
        if files.is_file(path):
            settings[CLEARML_FILE] = str(path)  # absolute, and no secret itself
            del passed[CLEARML_FILE]
    placed = replace(request, passed=passed, settings=settings)
    paths = dict.fromkeys(path for _, path in secret_files(placed))
    for variable, path in secret_files(placed):
        if not path.is_absolute() or not files.is_file(path):
            where = " on the remote machine" if files.remote else ""
            raise UsageError(
                f"{variable}={path}: must be the absolute path of a file{where}; correct or unset it"
            )
    mounts = (Mount(source=str(path), target=str(path)) for path in paths)
    return replace(placed, volumes=(*request.volumes, *mounts))


def secret_files(request: Request) -> Iterator[tuple[str, Path]]:
    """Yield the files that replicas are shown, each with the variable that names it."""
    for variable in PASSWORD_FILES:
        if named := request.passed.get(variable):
            yield variable, Path(named)
    if CLEARML_FILE in request.settings:
        yield CLEARML_FILE, Path(request.settings[CLEARML_FILE])
