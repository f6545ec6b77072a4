"""Read what a trainer says of itself in `<runs>/.workers/<replica>.json`: data from inside a replica, so not trusted."""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    best_fitness: float | None = None
    finished: int | None = None
    budget: int | None = None
    eta_s: float | None = None
    search_ends_at: float | None = None
    """Unix seconds: when the search as a whole is expected to end."""
    message: str | None = None
    updated: float | None = None


def read_progress(runs: Path, replica: str, since: float | None = None) -> Progress:
    """Return the replica's progress; an empty one for a file that is absent, foreign, or from before `since`.

    Links and pipes are not followed or waited for: replicas can put them there.
    """
    return _progress(read_json(runs / FOLDER / f"{replica}.json"), since)


def progress_of(engine: Engine, state: ReplicaState) -> Progress:
    """Return a replica's progress from the runs folder here, or, of another machine, by way of its engine."""
    return _progress(worker_values(engine, state, f"{state.name}.json"), state.started_at)


def worker_values(engine: Engine, state: ReplicaState, file: str) -> dict[str, Any]:
    """Return what a file of the replica's below `<runs>/.workers` holds; nothing for one that is absent or foreign."""
    if not engine.remote:
        return read_json(state.runs / FOLDER / file)
    mounts: list[dict[str, str]] = state.plan.get("mounts") or []
    inside = [mount["target"] for mount in mounts if mount["source"] == str(state.runs)]
    return _parse(engine.read_file(state.id, f"{inside[0]}/{FOLDER}/{file}", MOST_BYTES)) if inside else {}


def _progress(values: dict[str, Any], since: float | None) -> Progress:
    updated = _number(values.get("updated"))
    if since is not None and updated is not None and updated < since:
        return Progress()
    return Progress(
        phase=_text(values.get("phase")),
        candidate=_text(values.get("candidate")),
        epoch=_whole(values.get("epoch")),
        epochs=_whole(values.get("epochs")),
        best_fitness=_number(values.get("best_fitness")),
        finished=_whole(values.get("finished")),
        budget=_whole(values.get("budget")),
        eta_s=_number(values.get("eta_s")),
        search_ends_at=_number(values.get("search_ends_at")),
        message=_text(values.get("message")),
        updated=updated,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file that others may have put there; an empty one for anything else."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return {}
            return _parse(file.read(MOST_BYTES))
    except OSError:
        return {}


def _parse(text: bytes) -> dict[str, Any]:
    try:
        values = json.loads(text)
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
    return "".join(letter for letter in str(value)[:200] if letter.isprintable())
