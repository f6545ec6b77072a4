"""The event log: one JSON line per event, appended by one trainer, read by the bridge from a saved offset."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import IO, Any

from starling.core.files.atomic import append_line
from starling.core.files.refusals import refusal
from starling.core.files.safe_open import make_folder, open_file
from starling.core.plain_json import parse_json
from starling.core.redaction import Redaction
from starling.core.words import shown

logger = logging.getLogger(__name__)

SCHEMA = 1
"""Version of the line format, field `v` of each line."""

STATUSES = frozenset({"finished", "failed", "killed", "pruned"})

RUN_ARTIFACTS = {
    "opt.yaml": "config",
    "hyp.yaml": "config",
    "results.csv": "table",
    "summary.json": "table",
    "*.diff": "diff",
    "*.png": "plot",
    "*.jpg": "plot",
    "weights/epoch*.pt": "weights",
    "weights/best.pt": "weights",
    "weights/last.pt": "weights",
}
"""Files that a training sends, when they appear and at its end: pattern below its run directory -> kind."""

CANDIDATE_ARTIFACTS = {"hyp.yaml": "config", "results.csv": "table"}
"""Files that a candidate of a search sends: only small ones, because there are many candidates."""

SEARCH_ARTIFACTS = {
    "opt.yaml": "config",
    "evolve.csv": "table",
    "hyp_evolve.yaml": "config",
    "report.html": "report",
    "*.diff": "diff",
    "*.png": "plot",
    "*.jpg": "plot",
    "weights/best.pt": "weights",
}
"""Files that the run of a search sends at its end."""

_FIELDS: dict[str, frozenset[str]] = {
    "run_start": frozenset({"name", "project", "dir", "parent", "shared", "params", "tags"}),
    "metrics": frozenset({"step", "values"}),
    "artifact": frozenset({"path", "kind"}),
    "dataset": frozenset({"role", "name", "digest", "source", "figures", "classes"}),
    "picture": frozenset({"path", "name", "step"}),
    "model": frozenset({"path", "name", "step", "values"}),
    "message": frozenset({"text"}),
    "run_end": frozenset({"status", "reason"}),
    "log_end": frozenset(),
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "run_start": {"parent": None, "shared": False, "params": {}, "tags": {}},
    "dataset": {"figures": {}, "classes": []},
    "model": {"values": {}},
    "run_end": {"reason": ""},
}
_CHUNK_BYTES = 4 << 20
_TAIL_BYTES = 64 << 10


_MOST_TEXT = 1 << 20
"""Maximum characters of a string; lines of the console and parameters are far shorter."""
_MOST_NAME = 4096
_MOST_COUNT = 1 << 53
"""Maximum step and sequence number: every database and every float holds it exactly."""
_LATEST_TIME = 1e11
"""Maximum time in seconds since the epoch: the year 5138."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """A line that is no event; `end` is the byte offset in the log just behind the line."""

    end: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One event read from a log; `end` is the byte offset in the log just behind the event."""

    name: str
    seq: int
    time: float
    run: str
    fields: Mapping[str, Any]
    end: int


class EventLog:
    """Append events to the log at `path`; each log has one writer.

    `run_uuid` is the run that events belong to unless `append` names another. A log that cannot be written
    never stops training: the event is counted in `dropped`, and the first one is logged as a warning.
    """

    def __init__(
        self,
        path: Path,
        run_uuid: str | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self.run_uuid = run_uuid
        self.dropped = 0
        self._clock = clock
        self._next_seq: int | None = None
        self._redacted = Redaction()
        self._announced: dict[tuple[str | None, Path], int] = {}
        """(Run, file) -> the file's modification time when it was announced."""

    def append(self, event: str, /, *, run: str | None = None, **fields: Any) -> None:
        """Append one event in a single write.

        | event       | fields                                                                             |
        |-------------|------------------------------------------------------------------------------------|
        | `run_start` | name, project, dir (the run directory), parent {uuid, name} or None, params, tags, |
        |             | shared (whether other processes report the run too, as workers of a search do)     |
        | `metrics`   | step (the epoch), values {name: number}                                            |
        | `artifact`  | path (relative to the run directory), kind                                         |
        | `dataset`   | role (train, val), name, digest, source (path or URL), figures {name: number}, classes |
        | `picture`   | path (its own for each step, since it is read later), name, step                   |
        | `model`     | path, name (best, last, epochN), step, values {name: number} that it reached        |
        | `message`   | text: a line of the console                                                        |
        | `run_end`   | status (finished, failed, killed, pruned), reason                                  |
        | `log_end`   | none: nothing follows until the run is resumed                                     |

        NaN and infinity are written as strings, because strict JSON has no such numbers. Credentials in addresses, and
        passwords in the environment, are redacted. Raises ValueError for an unknown
        event or field, and TypeError for a value that is not plain (such as a tensor: reading it would wait
        for the device, which is the caller's decision).
        """
        complete = self._checked(event, fields)
        uuid = run or self.run_uuid
        if uuid is None and event != "log_end":
            raise ValueError(f"{event}: the log has no run of its own, so name one with run=")
        head = {"v": SCHEMA, "time": round(self._clock(), 3), "run": uuid or "", "event": event}
        try:
            if self._next_seq is None:
                make_folder(self.path.parent)
                self._next_seq = _last_seq(self.path) + 1
            line = json.dumps({**head, "seq": self._next_seq, **complete}, allow_nan=False)
            # A partial last line, left by a kill or a full disk, gets a line end first; readers skip it.
            append_line(self.path, ("\n" if _is_torn(self.path) else "") + line)
            self._next_seq += 1
        except OSError as error:
            self.dropped += 1
            if self.dropped == 1:
                reason = refusal(error, self.path) or f"{self.path}: {error}"
                logger.warning(f"tracking: cannot append: {reason}; training goes on, events are lost")

    def announce(self, run_dir: Path, patterns: Mapping[str, str], *, run: str | None = None) -> None:
        """Append an `artifact` event for each file below `run_dir` that matches a pattern of the table.

        A file that was announced before and has not changed since is skipped.
        """
        for pattern, kind in patterns.items():
            for path in sorted(run_dir.glob(pattern)):
                if path.is_file():
                    self.announce_file(run_dir, path, kind, run=run)

    def announce_file(self, run_dir: Path, path: Path, kind: str, *, run: str | None = None) -> None:
        """Append an `artifact` event for a file below `run_dir`, unless this version of the file was announced."""
        changed = path.stat().st_mtime_ns
        if self._announced.get((run, path)) != changed:
            self._announced[run, path] = changed
            self.append("artifact", run=run, path=path.relative_to(run_dir).as_posix(), kind=kind)

    def _checked(self, event: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        if event not in _FIELDS:
            raise ValueError(f"unknown event {event!r}; known: {', '.join(_FIELDS)}")
        complete = {**_DEFAULTS.get(event, {}), **fields}
        if complete.keys() != _FIELDS[event]:
            wrong = ", ".join(sorted(complete.keys() ^ _FIELDS[event]))
            raise ValueError(f"{event}: missing or unknown fields: {wrong}")
        if event == "run_end" and complete["status"] not in STATUSES:
            raise ValueError(
                f"run_end: status {complete['status']!r} is not one of {', '.join(sorted(STATUSES))}"
            )
        if event == "run_start":
            # Relative, so that the path is right in a container and on the host.
            complete["dir"] = os.path.relpath(complete["dir"], self.path.parent)
        if "values" in complete:
            complete["values"] = {name: _number(name, value) for name, value in complete["values"].items()}
        return {name: _plain(value, self._redacted) for name, value in complete.items()}


def _opened(path: Path) -> IO[bytes]:
    """Open a log for reading: never a link, and never a pipe, which would block the reader."""
    return open(open_file(path, os.O_RDONLY), "rb")


def read_events(path: Path, offset: int = 0) -> tuple[list[Event], int]:
    """Return the complete events from byte `offset` on (a few MiB at most), and the next offset.

    A last line without a line end is left for the next call; a line that is no event is skipped. A missing log
    has no events.
    """
    found, end = read_lines(path, offset)
    return [event for event in found if isinstance(event, Event)], end


def read_lines(path: Path, offset: int = 0) -> tuple[list[Event | Damage], int]:
    """Return the lines as `read_events` does, with a Damage for each line that is no event."""
    try:
        with _opened(path) as file:
            file.seek(offset)
            chunk = file.read(_CHUNK_BYTES)
    except FileNotFoundError:
        return [], offset
    whole = chunk.rfind(b"\n") + 1
    if not whole:
        # No event is as long as the chunk: skip it. A shorter rest is a line that is being written.
        return [], offset + (len(chunk) if len(chunk) == _CHUNK_BYTES else 0)
    return list(_parse(chunk[:whole].splitlines(keepends=True), offset)), offset + whole


def console_text(path: Path, run: str, end: int) -> str:
    """Return all lines of a run's console before byte `end` of the log."""
    lines: list[str] = []
    offset = 0
    while offset < end:
        events, after = read_events(path, offset)
        if after == offset:
            break
        lines += [
            f"{event.fields['text']}\n"
            for event in events
            if event.name == "message" and event.run == run and event.end <= end
        ]
        offset = after
    return "".join(lines)


def metric_values(event: Event) -> dict[str, float]:
    """Return the values of a `metrics` or `model` event as floats, including NaN and infinity."""
    return {str(name): float(value) for name, value in event.fields["values"].items()}


def _parse(lines: Iterable[bytes], offset: int) -> Iterable[Event | Damage]:
    for line in lines:
        offset += len(line)
        if not line.strip():
            continue
        try:
            event = _event(line, offset)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield Damage(end=offset, reason=shown(error))
            continue
        if event is not None:
            yield event


def _event(line: bytes, end: int) -> Event | None:
    """Return the event in a line; None for another version. For any other line raises what `_parse` catches."""
    record = parse_json(line)
    name = record.pop("event")
    record = {**_DEFAULTS.get(name, {}), **record}
    if record.pop("v") != SCHEMA or name not in _FIELDS:
        return None
    missing = _FIELDS[name] - record.keys()
    if missing:
        raise ValueError(f"{name} without {', '.join(sorted(missing))}")
    seq, at, run = record.pop("seq"), record.pop("time"), record.pop("run")
    for field in ("run", *_FIELDS[name]):
        value = run if field == "run" else record[field]
        if not _KINDS[field](value):
            raise ValueError(f"{name} with {field}={shown(repr(value), 60)}")
    if not _is_count(seq) or not _is_number(at) or not 0 <= at <= _LATEST_TIME:
        raise ValueError(f"{name} with an impossible number or time")
    return Event(name=name, seq=seq, time=float(at), run=run, fields=record, end=end)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -1 <= value <= _MOST_COUNT


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MOST_NAME and not _NO_TEXT.search(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MOST_TEXT and not _HALVES.search(value)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_name, value))


def _is_figures(value: Any) -> bool:
    """Return whether `value` maps names to numbers; NaN and infinity are strings."""
    return _is_mapping(value) and all(_is_number(item) or item in _NOT_FINITE for item in value.values())


_HALVES = re.compile("[\ud800-\udfff]")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_NOT_FINITE = ("nan", "inf", "-inf")
_KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("name", "project", "dir", "path", "kind", "role", "digest", "run"), _is_name),
    **dict.fromkeys(("text", "reason", "source"), _is_text),
    **dict.fromkeys(("params", "tags"), _is_mapping),
    **dict.fromkeys(("values", "figures"), _is_figures),
    "parent": lambda value: value is None or _is_mapping(value),
    "shared": lambda value: isinstance(value, bool),
    "step": _is_count,
    "classes": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "status": lambda value: value in STATUSES,
}
"""The check of each field: anyone who may write to a run's folder may write anything into its log."""


def _plain(value: Any, redacted: Callable[[str], str]) -> Any:
    """Return `value` as JSON can hold it, with its strings redacted; raises TypeError for a value that is not plain."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        return number if math.isfinite(number) else str(number)
    if isinstance(value, Path):
        return redacted(str(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item, redacted) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, redacted) for item in value]
    raise TypeError(f"events hold plain values only, not {type(value).__name__}; use .item() or str() first")


def _number(name: str, value: Any) -> float:
    if not isinstance(value, Real):
        raise TypeError(f"metric {name!r} is a {type(value).__name__}, not a number; use .item() first")
    return float(value)


def _is_torn(path: Path) -> bool:
    """Return whether the file's last byte is not a line end."""
    try:
        with _opened(path) as file:
            if not file.seek(0, os.SEEK_END):
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except FileNotFoundError:
        return False


def last_event(path: Path) -> Event | None:
    """Return the last complete event of a log, or None; reads only the last part of the log."""
    try:
        with _opened(path) as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - _TAIL_BYTES)
            file.seek(start)
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return None
    for line in reversed(lines):  # a bridge calls this twice a second: only the last event is parsed
        size -= len(line)
        for event in _parse([line] if line.endswith(b"\n") else [], size):
            if isinstance(event, Event):
                return event
    return None


def last_status(path: Path, run: str) -> str | None:
    """Return how the newest session of `run` in a log ended; an empty string if it has not ended, None without a log.

    Reads the whole log.
    """
    status: str | None = None
    offset = 0
    while True:
        events, after = read_events(path, offset)
        if after == offset:
            return status
        for event in events:
            if event.run == run and event.name in ("run_start", "run_end"):
                status = str(event.fields.get("status", "")) if event.name == "run_end" else ""
        offset = after


def tells_metrics(path: Path, run: str, step: int) -> bool:
    """Return whether a log holds the metrics of a run at this step. Reads the whole log."""
    offset = 0
    while True:
        events, after = read_events(path, offset)
        if any(e.name == "metrics" and e.run == run and e.fields["step"] == step for e in events):
            return True
        if after == offset:
            return False
        offset = after


def _last_seq(path: Path) -> int:
    event = last_event(path)
    return event.seq if event else -1
