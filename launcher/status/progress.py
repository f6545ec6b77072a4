"""Read what a replica says of itself: its trainer in `<runs>/.workers/<replica>.json`, its supervisor beside it.

Data from inside a replica, so not trusted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.hosts.files import read_below, read_plain
from launcher.parallel import in_parallel
from starling.core.folder import Folder
from starling.core.plain_json import parse_json
from starling.core.words import printable

if TYPE_CHECKING:
    from launcher.engines.base import Engine, ReplicaState

FOLDER = ".workers"
MOST_BYTES = 65536


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A trainer's own account of where it is; None for what it has not said."""

    phase: str | None = None
    candidate: str | None = None
    epoch: int | None = None
    epochs: int | None = None
    images_per_s: float | None = None
    best_fitness: float | None = None
    finished: int | None = None
    budget: int | None = None
    eta_s: float | None = None
    search_ends_at: float | None = None
    """Unix seconds: when the search as a whole is expected to end."""
    message: str | None = None
    updated: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Restarts:
    """A supervisor's account of its trainer's crashes; None for what it has not said."""

    done: int | None = None
    most: int | None = None
    restart_at: float | None = None
    """Unix seconds: when the wait for the next try ends; None while the trainer is there."""
    delay_s: float | None = None
    """How long that wait is in all."""
    oom_killed: bool = False
    """The kernel has killed one of the replica's processes for memory."""

    def wait_s(self, now: float) -> float | None:
        """Return the seconds until the next try, whatever was done to the clock meanwhile; None for none."""
        if self.restart_at is None:
            return None
        return min(max(self.restart_at - now, 0.0), self.delay_s or 0.0)


def read_progress(runs: Path, replica: str) -> Progress:
    """Return the replica's progress; an empty one for a file that is absent or foreign.

    What an earlier replica of this name said has been put away by the supervisor, so no clock decides. Links and pipes
    are not followed or waited for: replicas can put them there.
    """
    return progress_in(_parse(read_below(runs / FOLDER / f"{replica}.json", MOST_BYTES)))


def read_restarts(runs: Path, replica: str) -> Restarts:
    """Return what the replica's supervisor says; an empty account for a file that is absent or foreign."""
    return restarts_in(_parse(read_below(runs / FOLDER / f"{replica}.restarts.json", MOST_BYTES)))


Told = tuple[Progress, Restarts]
Read = Callable[["ReplicaState", str], Mapping[str, Any]]
"""Returns what a replica's file of a name in `<runs>/.workers` holds; nothing for one that is absent or foreign."""


def told_by(engine: Engine, states: Sequence[ReplicaState]) -> list[Told]:
    """Return what each replica's trainer and its supervisor say: from the runs folder, else by way of the engine."""
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
        return Progress(), Restarts()  # what lies there is an earlier replica's
    trainer, supervisor = (read(state, file) for file in _files_of(state))
    return progress_in(trainer), restarts_in(supervisor)


def _files_of(state: ReplicaState) -> tuple[str, str]:
    return f"{state.name}.json", f"{state.name}.restarts.json"


def _ask_engine(engine: Engine, state: ReplicaState, file: str) -> dict[str, Any]:
    mounts: list[dict[str, str]] = state.plan.get("mounts") or []
    inside = [mount["target"] for mount in mounts if mount["source"] == str(state.runs)]
    return _parse(engine.read_file(state.id, f"{inside[0]}/{FOLDER}/{file}", MOST_BYTES)) if inside else {}


def progress_in(values: Mapping[str, Any]) -> Progress:
    """Return the progress in a trainer's file."""
    return Progress(
        phase=_text(values.get("phase")),
        candidate=_text(values.get("candidate")),
        epoch=_whole(values.get("epoch")),
        epochs=_whole(values.get("epochs")),
        images_per_s=_number(values.get("images_per_s")),
        best_fitness=_number(values.get("best_fitness")),
        finished=_whole(values.get("finished")),
        budget=_whole(values.get("budget")),
        eta_s=_number(values.get("eta_s")),
        search_ends_at=_number(values.get("search_ends_at")),
        message=_text(values.get("message")),
        updated=_number(values.get("updated")),
    )


def restarts_in(values: Mapping[str, Any]) -> Restarts:
    """Return the account in a supervisor's file."""
    return Restarts(
        done=_whole(values.get("restarts")),
        most=_whole(values.get("max_restarts")),
        restart_at=_number(values.get("restart_at")),
        delay_s=_number(values.get("delay_s")),
        oom_killed=values.get("oom_killed") is True,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file that others may have put there; an empty one for anything else."""
    try:
        with Folder.resolve(path.parent) as folder:
            return _parse(read_plain(folder, path.name, MOST_BYTES))
    except (OSError, ValueError):
        return {}


def read_json_below(top: Folder, folder: str, file: str) -> dict[str, Any]:
    """Return the JSON object in `<top>/<folder>/<file>`, following no link; an empty one for anything else."""
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


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def _text(value: Any) -> str | None:
    """Return a short text without control characters, which could otherwise steer the user's terminal."""
    if value is None or isinstance(value, (dict, list)):
        return None
    return printable(str(value)[:200])
