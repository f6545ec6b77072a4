"""Read the status files of a replica: `<runs>/.workers/<replica>.json` of its trainer, and its supervisor's beside it.

The data comes from inside a replica and is not trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.hosts.files import read_below, read_plain
from launcher.parallel import in_parallel
from starling.core.files.folder import Folder
from starling.core.plain_json import parse_json
from starling.core.worker_status import (
    FOLDER,
    Restarts,
    TrainerStatus,
    progress_in,
    restarts_file,
    restarts_in,
    status_file,
)

if TYPE_CHECKING:
    from launcher.engines.base import Engine, ReplicaState

MOST_BYTES = 65536


def read_progress(runs: Path, replica: str) -> TrainerStatus:
    """Return the replica's progress; an empty status if the file is missing or invalid.

    The supervisor has moved away the file of an earlier replica of this name, so no times are compared. Links are not
    followed and pipes do not block, because replicas can place them there.
    """
    return progress_in(_parse(read_below(runs / FOLDER / status_file(replica), MOST_BYTES)))


def read_restarts(runs: Path, replica: str) -> Restarts:
    """Return the restarts that the replica's supervisor reports; empty if the file is missing or invalid."""
    return restarts_in(_parse(read_below(runs / FOLDER / restarts_file(replica), MOST_BYTES)))


Told = tuple[TrainerStatus, Restarts]
Read = Callable[["ReplicaState", str], Mapping[str, Any]]
"""Returns the contents of a replica's named file in `<runs>/.workers`; empty if the file is missing or invalid."""


def told_by(engine: Engine, states: Sequence[ReplicaState]) -> list[Told]:
    """Return the reports of each replica's trainer and supervisor, from the runs folder or else through the engine."""
    if not states:
        return []
    paths = [state.runs / FOLDER / file for state in states for file in _files_of(state)]
    heads = engine.host.read_status(paths, MOST_BYTES)
    if heads is not None:
        return [
            _told(state, lambda state, file: _parse(heads[state.runs / FOLDER / file])) for state in states
        ]
    asked = in_parallel(lambda state: _told(state, partial(_ask_engine, engine)), states)
    return [outcome.value for outcome in asked]


def _told(state: ReplicaState, read: Read) -> Told:
    if state.phase == "created":
        return TrainerStatus(), Restarts()  # existing files are an earlier replica's
    trainer, supervisor = (read(state, file) for file in _files_of(state))
    return progress_in(trainer), restarts_in(supervisor)


def _files_of(state: ReplicaState) -> tuple[str, str]:
    return status_file(state.name), restarts_file(state.name)


def _ask_engine(engine: Engine, state: ReplicaState, file: str) -> dict[str, Any]:
    mounts: list[dict[str, str]] = state.plan.get("mounts") or []
    inside = [mount["target"] for mount in mounts if mount["source"] == str(state.runs)]
    return _parse(engine.read_file(state.id, f"{inside[0]}/{FOLDER}/{file}", MOST_BYTES)) if inside else {}


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in an untrusted file; an empty dict for anything else."""
    try:
        with Folder.resolve(path.parent) as folder:
            return _parse(read_plain(folder, path.name, MOST_BYTES))
    except (OSError, ValueError):
        return {}


def read_json_below(top: Folder, folder: str, file: str) -> dict[str, Any]:
    """Return the JSON object in `<top>/<folder>/<file>` without following links; an empty dict for anything else."""
    try:
        with top.folder(folder) as below:
            return _parse(read_plain(below, file, MOST_BYTES))
    except (OSError, ValueError):
        return {}


def _parse(text: bytes) -> dict[str, Any]:
    try:
        values = parse_json(text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
