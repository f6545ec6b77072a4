"""Repair a study's journal: drop damaged records, and name the candidates that the records belonged to.

A trial's number is its position among the records that create trials. So a damaged record of this kind is not
dropped but replaced by a failed trial, and every later record still refers to the right trial. The record that creates
the study holds only known values, and is written again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend

from starling.core.budget import BudgetExceeded
from starling.core.errors import CheckpointError, UsageError
from starling.core.files.atomic import write_atomic
from starling.core.files.regular import read_regular
from starling.core.lock import held, try_flock, wait_for
from starling.search.outcome import State
from starling.search.storage.checksum import has_lost_line_end, looks_like_record, opened, sealed
from starling.search.storage.journal import JOURNAL, LOCK, STUDY, UNREPLAYABLE, folder_locked, writing

CREATE_STUDY, CREATE_TRIAL, END_TRIAL = 0, 4, 6
_FAILED, _MAXIMIZE = 3, 2
_NOTHING = 10
"""Code of a record that changes nothing; Optuna's own Rust implementation skips it."""
REASON = "its record in the journal was damaged, and dropped by a repair"
WORKER = "repair"
_MOST_BYTES = 512 << 20
"""Maximum size of a journal; a journal of 100,000 candidates has about 200 MB."""
_MOST_DAMAGED = 2000
"""Maximum number of damaged lines; for each, all later lines are searched. 0.5 MB of random bytes has as many."""
LOCK_WAIT_S = 30.0
"""Seconds that a repair waits for a worker that holds the study's lock."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropped:
    """A damaged record."""

    line: int
    what: str
    candidates: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Repair:
    """The result of a repair; if `dropped` is empty, nothing was damaged."""

    journal: Path
    copy: Path | None = None
    dropped: tuple[Dropped, ...] = field(default_factory=tuple)


def repair(directory: Path, *, wait_s: float = LOCK_WAIT_S) -> Repair:
    """Repair the journal in `directory`, atomically; a copy of the damaged file stays beside it.

    Workers wait during the repair. Workers that have read the damaged file end with a message, and must be restarted.
    Raises UsageError if there is no journal, CheckpointError if a worker keeps it locked or the disk refuses.
    """
    path = directory.absolute() / JOURNAL
    if not path.is_file() or path.is_symlink():
        raise UsageError(f"{directory}: holds no search; give the folder that has {JOURNAL}")
    with _alone(path, wait_s):
        lines = _lines_of(path)
        if lines and opened(lines[0]) is None and not any(map(looks_like_record, lines)):
            raise UsageError(f"{path}: is no study's journal, so there is nothing to repair")
        if lines and not lines[-1].endswith(b"\n") and not has_lost_line_end(lines[-1]):
            lines.pop()  # a killed writer's partial line; the next append would remove it too
        try:
            kept, dropped = mend(lines)
        except BudgetExceeded as error:
            raise UsageError(
                f"{path}: holds {error}, so it is not repaired; restore it from a copy"
            ) from None
        if not dropped:
            return Repair(journal=path)
        with writing(path):
            copy = _free_name(path)
            shutil.copy2(path, copy)
            mode = path.stat().st_mode
            write_atomic(path, b"".join(kept))
            os.chmod(path, mode & 0o777)
    return Repair(journal=path, copy=copy, dropped=tuple(dropped))


def _lines_of(path: Path) -> list[bytes]:
    try:
        return read_regular(path, _MOST_BYTES).splitlines(keepends=True)
    except BudgetExceeded as error:
        raise UsageError(
            f"{path}: holds {error}, and a repair reads the whole file; restore it from a copy"
        ) from None


def mend(lines: Sequence[bytes]) -> tuple[list[bytes], list[Dropped]]:
    """Return the lines of a journal without the damaged ones, and a description of the damaged lines.

    Raises BudgetExceeded for more damaged lines than a repair handles.
    """
    records = _replayed([opened(line) for line in lines])
    if records.count(None) > _MOST_DAMAGED:
        raise BudgetExceeded(f"over {_MOST_DAMAGED:,} damaged lines")
    kept: list[bytes] = []
    dropped: list[Dropped] = []
    trials = 0
    """Number of records so far that create a trial."""
    has_study = False
    for number, (line, record) in enumerate(zip(lines, records, strict=True)):
        if record is not None:
            kept.append(line if line.endswith(b"\n") else line + b"\n")
            trials += record["op_code"] == CREATE_TRIAL
            has_study = has_study or record["op_code"] == CREATE_STUDY
            continue
        if not has_study and not any(
            r is not None and r["op_code"] == CREATE_STUDY for r in records[number:]
        ):
            has_study = True
            kept.append(sealed(_study()))
            if b'"study_name"' in line or not re.search(rb'"(?:trial|study)_id"', line):
                dropped.append(Dropped(line=number + 1, what="the study's beginning; written again"))
                continue
        lost = _lost_trials(lines, records, number, trials)
        if lost:
            kept += [sealed(_failed_trial(trials + index)) for index in range(lost)]
            numbers = tuple(range(trials, trials + lost))
            trials += lost
            what = "the beginning of candidates: hyperparameters and results are lost, each counts as failed"
            dropped.append(Dropped(line=number + 1, what=what, candidates=numbers))
        else:
            dropped.append(Dropped(line=number + 1, what=_words_for(line), candidates=_named(line, trials)))
    return kept, dropped


class _Records(BaseJournalBackend):
    """A journal backend from which Optuna replays given records."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any] | None] = []
        self.number = 0
        """Number of the last yielded record."""

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yield the records from number `log_number_from` on."""
        for number in range(log_number_from, len(self.records)):
            self.number = number
            yield self.records[number] or {"op_code": _NOTHING}

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Refuse to write."""
        raise NotImplementedError("nothing is written to what is replayed")


def _replayed(records: Sequence[dict[str, Any] | None]) -> list[dict[str, Any] | None]:
    """Return the records, with None for each that Optuna cannot replay: damage without checksum may still be JSON."""
    source = _Records()
    storage = JournalStorage(source)
    source.records = list(records)
    while True:
        try:
            storage.get_all_studies()
            return source.records
        except UNREPLAYABLE:  # Optuna counts the record as read: the next round continues behind it
            source.records[source.number] = None


def _lost_trials(
    lines: Sequence[bytes], records: Sequence[dict[str, Any] | None], number: int, trials: int
) -> int:
    """Return how many records that create trials are lost in the damaged line `number`, after `trials` earlier ones.

    Later records decide if they can: the `root` of a candidate's first attempt is its own number.
    """
    evidence = _creates_in(lines[number])
    others = later = 0
    for index in range(number + 1, len(lines)):
        record = records[index]
        if record is None:
            others += _creates_in(lines[index])
            continue
        if record["op_code"] == CREATE_TRIAL:
            attributes = record.get("user_attrs") or {}
            if isinstance(attributes.get("root"), int) and "retry_of" not in attributes:
                return max(int(attributes["root"]) - trials - later - others, 0)
            later += 1
        elif isinstance(record.get("trial_id"), int):
            missing = record["trial_id"] + 1 - trials - later - others
            if missing > evidence:
                return int(missing)
    return evidence


def _creates_in(line: bytes) -> int:
    """Return the estimated number of trials that the damaged bytes create."""
    counts = [line.count(sign) for sign in (b'"distributions":', b'"params":', b'"intermediate_values":')]
    return sorted(counts)[1]


def _named(line: bytes, trials: int) -> tuple[int, ...]:
    """Return the numbers of candidates in damaged bytes; a journal has one study, so a trial's id is its number."""
    found = {int(number) for number in re.findall(rb'"trial_id":(\d{1,9})\b', line)}
    return tuple(sorted(number for number in found if number < trials))


def _words_for(line: bytes) -> str:
    """Return what a damaged record was about, and the consequence."""
    if b'"intermediate_value"' in line:
        return "a fitness before the end; the candidate is judged without it"
    if b'"values"' in line and b'"state"' in line:
        return "the end of a candidate, which counts as running and will be taken over"
    if b'"user_attr"' in line and b'"study_id"' in line:
        return "a fact of the search (definition, budget or id); a worker started with the same command writes it again"
    if b'"user_attr"' in line:
        return "a detail of a candidate's end (figures or reason)"
    return "not readable any more"


def _study() -> dict[str, Any]:
    return {"op_code": CREATE_STUDY, "worker_id": WORKER, "study_name": STUDY, "directions": [_MAXIMIZE]}


def _failed_trial(number: int) -> dict[str, Any]:
    """Return the record of a failed trial that replaces a lost one."""
    now = datetime.now(tz=UTC).isoformat(timespec="microseconds")
    return {
        "op_code": CREATE_TRIAL,
        "worker_id": WORKER,
        "study_id": 0,
        "datetime_start": now,
        "state": _FAILED,
        "value": None,
        "values": None,
        "datetime_complete": now,
        "distributions": {},
        "params": {},
        "user_attrs": {"worker": WORKER, "root": number, "ending": str(State.FAILED), "reason": REASON},
        "system_attrs": {},
        "intermediate_values": {},
    }


@contextlib.contextmanager
def _alone(path: Path, wait_s: float) -> Iterator[None]:
    """Hold the locks of the study and its journal; raises CheckpointError if a worker does not release them."""

    def give_up(line: str) -> None:
        raise CheckpointError(f"{line} It must end, or go on, before the journal can be repaired")

    def acquire(descriptor: int) -> bool:
        return wait_for(lambda: try_flock(descriptor), limit_s=wait_s, poll_s=0.01)

    with (
        folder_locked(path.with_name(LOCK), waiting=give_up),
        held(path, lambda: os.open(path, os.O_RDWR | os.O_CLOEXEC), acquire) as got,
    ):
        if not got:
            raise CheckpointError(f"{path}: a worker is writing to it for long; try again when it has ended")
        yield


def _free_name(path: Path) -> Path:
    """Return an unused name for the copy."""
    number = 1
    while (copy := path.with_name(f"{path.name}.damaged{number}")).exists():
        number += 1
    return copy


def as_json(done: Repair) -> str:
    """Return a repair as JSON."""
    dropped = [{"line": d.line, "what": d.what, "candidates": list(d.candidates)} for d in done.dropped]
    copy = None if done.copy is None else str(done.copy)
    return json.dumps({"journal": str(done.journal), "copy": copy, "dropped": dropped})
