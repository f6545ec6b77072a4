"""States in words: a table on a terminal, whole lines elsewhere, JSON for scripts, and an exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from launcher.engines.base import ReplicaState
from launcher.progress import Progress
from launcher.sizes import format_size

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("replica", "device", "state", "candidate", "epoch", "best fitness", "time left")

_LONGEST_REASON = 120
"""Characters of a trainer's own words in a line; `--json` has them all."""
_EXITS = {
    1: "error",
    2: "usage or configuration error",
    3: "data error",
    4: "checkpoint error",
    5: "engine error",
    127: "command not found",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One replica: what the engine says of it, and what it says of itself."""

    state: ReplicaState
    progress: Progress

    def cells(self) -> tuple[str, ...]:
        """Return the texts of `COLUMNS`; a dash for what is not known."""
        progress = self.progress
        epoch = "-" if progress.epoch is None else str(progress.epoch)
        if progress.epoch is not None and progress.epochs is not None:
            epoch = f"{progress.epoch}/{progress.epochs}"
        candidate = progress.candidate or "-"
        if progress.finished is not None and progress.budget is not None:
            candidate += f" ({progress.finished}/{progress.budget} done)"
        return (
            self.state.name,
            device_words(self.state.device),
            _state_words(self),
            candidate,
            epoch,
            "-" if progress.best_fitness is None else f"{progress.best_fitness:.4f}",
            format_duration(progress.eta_s) if self.state.live else "-",
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        state, progress = self.state, self.progress
        return {
            "replica": state.name,
            "fleet": state.fleet,
            "id": state.id,
            "device": state.device,
            "state": words_for(state),
            "phase": state.phase,
            "exit_code": state.exit_code,
            "oom_killed": state.oom_killed,
            "memory_bytes": state.memory_bytes,
            "started_at": _iso(state.started_at),
            "runs": str(state.runs),
            "candidate": progress.candidate,
            "epoch": progress.epoch,
            "epochs": progress.epochs,
            "best_fitness": progress.best_fitness,
            "finished": progress.finished,
            "budget": progress.budget,
            "eta_s": progress.eta_s,
            "search_ends_at": _iso(progress.search_ends_at),
            "trainer_phase": progress.phase,
            "message": progress.message,
            "updated": _iso(progress.updated),
        }


@dataclass(frozen=True, slots=True)
class Search:
    """One search, as its replicas tell of it: each knows what it last saw, so the one who has seen most is believed."""

    fleet: str
    finished: int
    """The generation: finished trainings of the budget."""
    budget: int
    best_fitness: float | None
    ends_at: float | None
    """Unix seconds, expected; None where nobody trains, or too little is known."""

    def words(self, now: float) -> str:
        """Return `blood/search: 12/60 finished, best fitness 0.5123, about 2 h 05 min left`."""
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
    """Return the searches that replicas work on, one a fleet, in the order of the rows."""
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


def words_for(state: ReplicaState) -> str:
    """Return a replica's state in words.

    Out of memory is the engine's own flag and never guessed from 137, which any `docker kill` gives too. The flag
    also stands when only a child was killed, with whatever exit code PID 1 then had.
    """
    limit = f" at {format_size(state.memory_bytes)}" if state.memory_bytes else ""
    if state.phase == "created":
        return "created, never started"
    if state.live:
        flag = f", a child was OOM-KILLED{limit}" if state.oom_killed else ""
        return ("paused" if state.phase == "paused" else "running") + flag
    code = state.exit_code
    if state.oom_killed:
        ended = "exited 0 all the same" if code == 0 else f"exited {code}"
        return f"OOM-KILLED{limit}" if code == 137 else f"a child was OOM-KILLED{limit}, {ended}"
    if code == 0:
        return "finished"
    if code in (130, 143):
        return f"stopped {code}: resumable"
    if code == 137:
        return "killed (137)"
    if code is not None and 128 < code < 160:
        return f"killed by signal {code - 128}"
    return f"exited {code}: {_EXITS.get(code if code is not None else 1, 'error')}"


def _state_words(row: Row) -> str:
    """Return the state, with the trainer's own phase while it runs, and its own reason where it failed."""
    phase, message = row.progress.phase, row.progress.message
    words = words_for(row.state)
    if row.state.phase == "exited" and not row.state.finished and phase == "failed" and message:
        return f"{words}: {shorten(message, _LONGEST_REASON, placeholder=' …')}"
    return f"{words}, {phase}" if row.state.phase == "running" and phase and words == "running" else words


def exit_code(states: Sequence[ReplicaState]) -> int:
    """Return `status`'s exit code: 0 when every replica runs or has finished, 1 when one has not, or there is none."""
    return 0 if states and all(state.phase == "running" or state.finished for state in states) else 1


def device_words(label: str) -> str:
    """Return `GPU 3` for `gpu:3`."""
    kind, _, number = label.partition(":")
    return f"{kind.upper()} {number}"


def format_duration(seconds: float | None) -> str:
    """Return `2 h 05 min`, `7 min`, `40 s`; a dash for None."""
    if seconds is None or seconds < 0:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def as_lines(rows: Sequence[Row]) -> list[str]:
    """Return aligned text, a line a replica below a heading."""
    cells = [COLUMNS, *(row.cells() for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(COLUMNS))]
    return [
        "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def as_table(rows: Sequence[Row], title: str | None = None) -> Table:
    """Return a table for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title)
    for column in COLUMNS:
        table.add_column(column, overflow="fold", no_wrap=column in ("device",))
    for row in rows:
        healthy = row.state.phase == "running" or row.state.finished
        cells = [escape(text) for text in row.cells()]
        table.add_row(*cells, style=None if healthy else "red")
    return table


def _iso(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return None
