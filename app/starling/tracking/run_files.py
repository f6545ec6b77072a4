"""Event logs below a folder: what of them is sent, and a run as one file to hand on."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from starling.core.errors import UsageError
from starling.core.files.atomic import TEMPORARY_SUFFIX, write_atomic
from starling.core.paths import real_path
from starling.core.words import printable
from starling.tracking.cursor import Cursor
from starling.tracking.events import read_events

LOG_NAME = "events.jsonl"
_OWN = {".lock", ".cursor"}
"""Files of the bridges, which mean nothing elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pending:
    """How far one log is delivered to one tracker."""

    log: str
    tracker: str
    sent: int
    """Events that the tracker has taken."""
    pending: int
    """Events that it has not."""
    left_out: int
    """Events that it refuses."""
    dropped: int
    """Samples of the machine given up while it was away."""
    problem: str
    """Why delivery is held up; empty when it is not."""


def find_logs(directory: Path) -> list[Path]:
    """Return the event logs below a folder, oldest first; links are not followed. Raises UsageError for none."""
    logs = sorted(_event_logs(directory), key=lambda log: log.stat().st_mtime)
    if not logs:
        raise UsageError(f"{directory}: holds no {LOG_NAME}; name a run directory or a folder of them")
    return logs


def pending(log: Path, trackers: Sequence[str]) -> list[Pending]:
    """Return how far a log is delivered: to the trackers that have a cursor in it, and to those named."""
    found = [path.suffixes[-2].lstrip(".") for path in sorted(log.parent.glob(f"{log.stem}.*.cursor"))]
    return [_pending(log, name) for name in dict.fromkeys([*found, *trackers])]


def _pending(log: Path, tracker: str) -> Pending:
    cursor = Cursor.look(log, tracker)
    return Pending(
        log=str(log),
        tracker=tracker,
        sent=cursor.sent,
        pending=_count(log, cursor.offset if cursor.offset <= log.stat().st_size else 0),
        left_out=cursor.rejected,
        dropped=cursor.dropped,
        problem=cursor.problem,
    )


def _count(log: Path, offset: int) -> int:
    """Return the number of events from a byte on, the log's own end not counted."""
    count = 0
    while True:
        events, after = read_events(log, offset)
        if after == offset:
            return count
        count += sum(event.name != "log_end" for event in events)
        offset = after


def export(directory: Path, target: Path, *, force: bool = False) -> int:
    """Write all files of a run directory into a zip at `target`, whole or not at all; return their number.

    Raises UsageError for a folder without an event log, for a target that is there or lies within the folder.
    """
    find_logs(directory)
    if target.exists() and not force:
        raise UsageError(f"{target}: is there already; name another with --out, or replace it with --force")
    if real_path(target).is_relative_to(real_path(directory)):
        raise UsageError(f"{target}: lies within the run itself; name a place outside with --out")
    files = sorted(_run_files(directory))

    def write(out: object) -> None:
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:  # type: ignore[call-overload]
            for path in files:
                stored = path.suffix in {".pt", ".onnx", ".jpg", ".png"}  # compressed as they are
                kind = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
                archive.write(
                    path, printable(Path(real_path(directory).name) / path.relative_to(directory)), kind
                )

    write_atomic(target, write)
    return len(files)


def _run_files(directory: Path) -> Iterator[Path]:
    """Yield what belongs to the run: no links, no half-written files, none of the bridges' own."""
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder) / name
            half = name.startswith(".") and TEMPORARY_SUFFIX in name
            if path.is_file() and not path.is_symlink() and not half and path.suffix not in _OWN:
                yield path


def _event_logs(directory: Path) -> Iterator[Path]:
    for folder, _, files in os.walk(directory):
        log = Path(folder) / LOG_NAME
        # Not a pipe, which nobody may ever write, nor a link.
        if LOG_NAME in files and stat.S_ISREG(log.lstat().st_mode):
            yield log
