"""How far a log has been delivered to one destination, in a small file beside the log."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TypeVar

from starling.core.files.atomic import write_atomic
from starling.core.files.safe_open import open_file, read_file
from starling.core.plain_json import parse_json
from starling.core.words import shown

_Kept = TypeVar("_Kept", "RunProgress", "Cursor")


@dataclass(kw_only=True, slots=True)
class RunProgress:
    """The bridge's record of one run in the log."""

    run_id: str
    """The tracker's id of the run."""
    directory: str
    """The run directory, relative to the log's folder."""
    started: float = 0.0
    """Start of the run's first session, in seconds since the epoch."""
    is_open: bool = True
    """Whether the end of the run has not been delivered yet."""
    is_shared: bool = False
    """Whether other processes report the run too, as workers report their search."""
    steps: dict[str, int] = field(default_factory=dict)
    """Metric name -> highest step sent; a resumed trainer may report its last epoch again."""


@dataclass(kw_only=True, slots=True)
class Cursor:
    """The position in the log, and the runs up to that position."""

    destination: str
    offset: int = 0
    first_line: str = ""
    """Digest of the log's first line, to distinguish a new log from an earlier one of the same name."""
    sent: int = 0
    rejected: int = 0
    dropped: int = 0
    """Number of samples of the machine dropped while the tracker was unreachable; events are never dropped."""
    problem: str = ""
    """Why delivery is held up at present; empty if it is not."""
    busy: str = ""
    """Long operation in progress; empty if there is none."""
    runs: dict[str, RunProgress] = field(default_factory=dict)

    @classmethod
    def load(cls, log: Path, tracker: str, destination: str) -> Cursor:
        """Read the cursor of `log`; return a new cursor for another destination, another log, or a damaged file.

        A new cursor is safe, because a tracker accepts every event twice.
        """
        try:
            stored = parse_json(read_file(cursor_path(log, tracker)))
            runs = {uuid: _checked(RunProgress(**run)) for uuid, run in stored.pop("runs").items()}
            cursor = _checked(cls(**stored, runs=runs))
            same_log = cursor.first_line == _first_line(log) and 0 <= cursor.offset <= log.stat().st_size
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return cls(destination=destination)
        if cursor.destination != destination or (cursor.offset and not same_log):
            return cls(destination=destination)
        return cursor

    @classmethod
    def look(cls, log: Path, tracker: str) -> Cursor:
        """Return the content of the cursor file for display; an empty cursor for a damaged file."""
        try:
            stored = parse_json(read_file(cursor_path(log, tracker)))
            return _checked(cls(**{"destination": "", **stored, "runs": {}}))
        except (OSError, ValueError, TypeError):
            return cls(destination="")

    def save(self, log: Path, tracker: str) -> None:
        """Replace the cursor file; raises OSError."""
        self.first_line = self.first_line or _first_line(log)
        write_atomic(cursor_path(log, tracker), json.dumps(asdict(self)))


def cursor_path(log: Path, tracker: str) -> Path:
    """Return the cursor file of `log` for one tracker: `events.mlflow.cursor` beside `events.jsonl`."""
    return log.with_name(f"{log.stem}.{tracker}.cursor")


def _checked(kept: _Kept) -> _Kept:
    """Return what was read if each field has the right type; raises ValueError."""
    for item in fields(kept):
        value, kind = getattr(kept, item.name), str(item.type)
        if kind == "float" and not isinstance(value, bool):
            sound = isinstance(value, (int, float)) and math.isfinite(value)
        elif kind == "int":
            sound = type(value) is int and 0 <= value < 2**63
        elif kind == "dict[str, int]":
            sound = isinstance(value, dict) and all(type(step) is int for step in value.values())
        else:
            sound = type(value).__name__ == kind.partition("[")[0]
        if not sound:
            raise ValueError(f"{item.name}={shown(repr(value), 60)}")
    return kept


def _first_line(log: Path) -> str:
    try:
        with open(open_file(log, os.O_RDONLY), "rb") as file:
            line = file.readline(1 << 20)
    except FileNotFoundError:
        return ""
    return hashlib.sha256(line).hexdigest()[:16] if line.endswith(b"\n") else ""
