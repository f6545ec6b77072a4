"""States in words, figures in columns, JSON for scripts, and an exit code."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from textwrap import shorten
from typing import Any

from launcher.engines.base import ReplicaState
from launcher.status.words import device_words, words_for
from starling.core.units import format_duration, format_share
from starling.core.worker_status import Restarts, TrainerStatus

COLUMNS = (
    *("replica", "device", "state", "candidate", "epoch", "img/s", "best", "time left"),
    *("GPU", "memory", "CPU", "restarts"),
)

_LONGEST_REASON = 240
"""The most characters of a trainer's message in a line; `--json` has the whole message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """The current usage of a running replica; unknown values are None."""

    memory_bytes: int | None = None
    cpu_percent: float | None = None
    """Percent of one core."""
    gpu_percent: float | None = None
    """Percent of time in which a GPU computes, averaged over the replica's GPUs."""


NOTHING_SAID, NOTHING_READ = Restarts(), Figures()


@dataclass(frozen=True, slots=True)
class Row:
    """One replica: its state from the engine, its own progress report, and its usage."""

    state: ReplicaState
    progress: TrainerStatus
    restarts: Restarts = NOTHING_SAID
    figures: Figures = NOTHING_READ

    def cells(self, now: float | None = None) -> tuple[str, ...]:
        """Return the texts of `COLUMNS` without the reason of a failure; unknown values are dashes."""
        progress, figures, live = self.progress, self.figures, self.state.live
        epoch = "-" if progress.epoch is None else str(progress.epoch)
        if progress.epoch is not None and progress.epochs is not None:
            epoch = f"{progress.epoch}/{progress.epochs}"
        training = live and progress.phase in ("training", None)
        used = format_share(figures.memory_bytes, self.state.memory_bytes)
        restarts = "-" if self.restarts.done is None else str(self.restarts.done)
        return (
            self.state.name,
            device_words(self.state.device),
            _state_words(self, time.time() if now is None else now),
            progress.candidate or "-",
            epoch,
            _rounded(progress.images_per_s if training else None),
            "-" if progress.best_fitness is None else f"{progress.best_fitness:.4f}",
            _left(progress.eta_s) if live else "-",
            _rounded(figures.gpu_percent, " %"),
            "-" if figures.memory_bytes is None else used,
            _rounded(figures.cpu_percent, " %"),
            restarts if self.restarts.most is None else f"{restarts}/{self.restarts.most}",
        )

    @property
    def reason(self) -> str:
        """The trainer's message about its failure; empty if it has not failed, or without a message."""
        progress = self.progress
        failed = self.state.phase == "exited" and not self.state.well and progress.phase == "failed"
        return (
            shorten(progress.message, _LONGEST_REASON, placeholder=" …")
            if failed and progress.message
            else ""
        )

    @property
    def waits(self) -> bool:
        """Whether the trainer has crashed and is about to restart."""
        return self.state.phase == "running" and self.restarts.restart_at is not None

    @property
    def known_state(self) -> ReplicaState:
        """The engine's state; the supervisor's report of a kill for memory counts if the engine has none."""
        killed = self.state.exit_code == 137 and self.restarts.oom_killed
        return replace(self.state, oom_killed=True) if killed else self.state

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        state, progress = self.state, self.progress
        return {
            "replica": state.name,
            "fleet": state.fleet,
            "id": state.id,
            "device": state.device,
            "state": words_for(self.known_state),
            "phase": state.phase,
            "exit_code": state.exit_code,
            "oom_killed": state.oom_killed,
            "memory_bytes": state.memory_bytes,
            "started_at": _iso(state.started_at),
            "runs": str(state.runs),
            "candidate": progress.candidate,
            "epoch": progress.epoch,
            "epochs": progress.epochs,
            "images_per_s": progress.images_per_s,
            "best_fitness": progress.best_fitness,
            "finished": progress.finished,
            "budget": progress.budget,
            "eta_s": progress.eta_s,
            "gpu_percent": self.figures.gpu_percent,
            "memory_used_bytes": self.figures.memory_bytes,
            "cpu_percent": self.figures.cpu_percent,
            "restarts": self.restarts.done,
            "max_restarts": self.restarts.most,
            "restart_at": _iso(self.restarts.restart_at),
            "search_ends_at": _iso(progress.search_ends_at),
            "trainer_phase": progress.phase,
            "message": progress.message,
            "updated": _iso(progress.updated),
        }


@dataclass(frozen=True, slots=True)
class Search:
    """One search, as its replicas report it: each reports what it last saw, and the most advanced report counts."""

    fleet: str
    finished: int
    """The number of finished trainings."""
    budget: int
    best_fitness: float | None
    ends_at: float | None
    """The expected end in Unix seconds; None if no replica trains, or too little is known."""

    def words(self, now: float) -> str:
        """Return `blood/search: 12/60 finished, best fitness 0.5123, about 2h05m left`."""
        words = f"{self.fleet}: {self.finished}/{self.budget} finished"
        if self.best_fitness is not None:
            words += f", best fitness {self.best_fitness:.4f}"
        if self.ends_at is not None and self.finished < self.budget:
            words += f", about {format_duration(max(self.ends_at - now, 0))} left"
        return words

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return {
            "fleet": self.fleet,
            "finished": self.finished,
            "budget": self.budget,
            "best_fitness": self.best_fitness,
            "ends_at": _iso(self.ends_at),
        }


def searches_of(rows: Sequence[Row]) -> list[Search]:
    """Return the searches that replicas work on, one per fleet, in the order of the rows."""
    fleets: dict[str, list[Row]] = {}
    for row in rows:
        if row.progress.finished is not None and row.progress.budget is not None:
            fleets.setdefault(row.state.fleet, []).append(row)
    return [_search(fleet, own) for fleet, own in fleets.items()]


def _search(fleet: str, rows: Sequence[Row]) -> Search:
    seen = [row.progress for row in rows]
    newest = max(seen, key=lambda progress: (progress.finished or 0, progress.updated or 0.0))
    bests = [progress.best_fitness for progress in seen if progress.best_fitness is not None]
    alive = any(row.state.phase == "running" for row in rows)
    return Search(
        fleet=fleet,
        finished=newest.finished or 0,
        budget=max(progress.budget or 0 for progress in seen),
        best_fitness=max(bests, default=None),
        ends_at=newest.search_ends_at if alive else None,
    )


def _state_words(row: Row, now: float) -> str:
    """Return the state in words: the phase of a running trainer, or the number of restarts of a failed one."""
    phase, restarts = row.progress.phase, row.restarts
    words = words_for(row.known_state)
    wait = restarts.wait_s(now)
    if row.waits and wait is not None:
        return f"restarting in {format_duration(wait)} ({restarts.done} of {restarts.most})"
    if row.state.phase == "running" and phase and words == "running":
        return phase
    if row.state.phase == "exited" and not row.state.well and restarts.done:
        return f"{words} after {restarts.done} restart{'s' * (restarts.done != 1)}"
    return words


def exit_code(states: Sequence[ReplicaState]) -> int:
    """Return `status`'s exit code: 0 if all run, have finished or were stopped; 1 if one failed, or there is none."""
    return 0 if states and all(state.well for state in states) else 1


def _left(seconds: float | None) -> str:
    return "-" if seconds is None or seconds < 0 else format_duration(seconds)


def _rounded(value: float | None, unit: str = "") -> str:
    return "-" if value is None or value < 0 else f"{value:.0f}{unit}"


def _iso(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return None
