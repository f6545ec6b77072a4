"""Read what a replica says of itself: its trainer in `<runs>/.workers/<replica>.json`, its supervisor beside it.

Data from inside a replica, so not trusted.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
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
    return progress_in(read_json(runs / FOLDER / f"{replica}.json"))


def read_restarts(runs: Path, replica: str) -> Restarts:
    """Return what the replica's supervisor says; an empty account for a file that is absent or foreign."""
    return restarts_in(read_json(runs / FOLDER / f"{replica}.restarts.json"))


def told_by(engine: Engine, state: ReplicaState) -> tuple[Progress, Restarts]:
    """Return what a replica's trainer and its supervisor say, from the runs folder here or by way of its engine."""
    if state.phase == "created":
        return Progress(), Restarts()  # what lies there is an earlier replica's
    trainer = worker_values(engine, state, f"{state.name}.json")
    return progress_in(trainer), restarts_in(worker_values(engine, state, f"{state.name}.restarts.json"))


def worker_values(engine: Engine, state: ReplicaState, file: str) -> dict[str, Any]:
    """Return what a file of the replica's below `<runs>/.workers` holds; nothing for one that is absent or foreign."""
    if not engine.remote:
        return read_json(state.runs / FOLDER / file)
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
