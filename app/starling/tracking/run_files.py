"""Event logs below a folder: how much of them is sent; and a run as one zip file."""

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
"""Suffixes of the bridges' own files, which are useless elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pending:
    """How much of one log is delivered to one tracker."""

    log: str
    tracker: str
    sent: int
    """Number of events that the tracker has accepted."""
    pending: int
    """Number of events that are not sent yet."""
    left_out: int
    """Number of events that the tracker has refused."""
    dropped: int
    """Number of samples of the machine that were dropped while the tracker was unreachable."""
    problem: str
    """Why delivery is held up; empty if it is not."""


def find_logs(directory: Path) -> list[Path]:
    """Return the event logs below a folder, oldest first; follow no links. Raises UsageError if there is none."""
    logs = sorted(_event_logs(directory), key=lambda log: log.stat().st_mtime)
    if not logs:
        raise UsageError(f"{directory}: holds no {LOG_NAME}; name a run directory or a folder of them")
    return logs


def pending(log: Path, trackers: Sequence[str]) -> list[Pending]:
    """Return how much of a log is delivered: to each tracker with a cursor beside it, and to each of `trackers`."""
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
    """Return the number of events from byte `offset` on, without `log_end`."""
    count = 0
    while True:
        events, after = read_events(log, offset)
        if after == offset:
            return count
        count += sum(event.name != "log_end" for event in events)
        offset = after


def export(directory: Path, target: Path, *, force: bool = False) -> int:
    """Write all files of a run directory into a zip at `target`, atomically; return their number.

    Raises UsageError for a folder without an event log, and for a target that exists or lies inside the folder.
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
                stored = path.suffix in {".pt", ".onnx", ".jpg", ".png"}  # already compressed
                kind = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
                archive.write(
                    path, printable(Path(real_path(directory).name) / path.relative_to(directory)), kind
                )

    write_atomic(target, write)
    return len(files)


def _run_files(directory: Path) -> Iterator[Path]:
    """Yield the files of the run: no links, no temporary files, no files of the bridges."""
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder) / name
            half = name.startswith(".") and TEMPORARY_SUFFIX in name
            if path.is_file() and not path.is_symlink() and not half and path.suffix not in _OWN:
                yield path


def _event_logs(directory: Path) -> Iterator[Path]:
    for folder, _, files in os.walk(directory):
        log = Path(folder) / LOG_NAME
        # Neither a pipe, which would block the reader, nor a link.
        if LOG_NAME in files and stat.S_ISREG(log.lstat().st_mode):
            yield log
