"""A study on disk: an append-only journal that stays usable after a kill, a full disk or a dead worker.

Optuna replays a file of JSON lines. Its own file backend has two faults on a shared volume: its lock can wait for ever
for a dead holder, and after a kill, a partial last line is joined with the next line, and no reader gets past it.
Here the lock is `flock`, which the kernel drops with its holder, and an append first removes a partial last line.

`flock` excludes all processes and containers of one host. Over a network file system it may fail between hosts:
`storage.check_storage` refuses network file systems; several hosts need PostgreSQL.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import BaseJournalBackend

from starling.core.errors import CheckpointError, UsageError
from starling.core.files.atomic import fsync_directory
from starling.core.files.refusals import disk_write, refusal
from starling.core.files.safe_open import make_folder, open_file, open_folder, state_of
from starling.core.lock import held, take, take_folder, try_flock, wait_for
from starling.core.words import shown
from starling.search.storage.checksum import (
    MOST_LINE_BYTES,
    has_lost_line_end,
    looks_like_record,
    opened,
    sealed,
)
from starling.search.storage.leases import FileLease, FileLeaseWatch, lease_path

logger = logging.getLogger(__name__)

T = TypeVar("T")

JOURNAL, LOCK = "study.journal", "study.lock"
STUDY = "search"
"""Name of the only study in a journal."""
_BEGINNING = b'{"op_code":'
"""First bytes of every record."""
_BLOCK = 64 * 1024
_PATIENCE_S = 30.0

UNREPLAYABLE = (
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    RecursionError,
)
"""Exceptions of Optuna and of the counts for damaged or invented records."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError inside the context into a StarlingError with `path` and the remedy.

    DiskFull if the disk refuses, UsageError for a link, CheckpointError for any other reason.
    """
    try:
        with disk_write(path):
            yield
    except OSError as error:
        raise refusal(error, path) or CheckpointError(
            f"{path}: cannot be written ({error.strerror}); the study is intact: check that the folder belongs to this "
            "user, then start the worker again"
        ) from error


@contextmanager
def understood(journal: Path | str, line: Callable[[], int] | None = None) -> Iterator[None]:
    """Turn exceptions of Optuna and of the counts for damaged or invented records into a CheckpointError with place.

    `line` returns the line number of a record that Optuna cannot replay; a repair can drop such a record.
    """
    try:
        yield
    except UNREPLAYABLE as error:
        at, drop = str(journal), ""
        if line is not None:
            at, drop = f"{at}:{line()}", f"drop it alone with starling search repair {Path(at).parent}, "
        raise CheckpointError(
            f"{at}: holds a record that is not one of a study ({shown(repr(error))}); {drop}restore the study from a "
            "copy, or start a search under another --name"
        ) from error


class _ToldJournal(JournalStorage):
    """Optuna's storage; an error names the record of the journal that cannot be replayed."""

    _backend: SafeJournalBackend

    def _sync_with_backend(self) -> None:
        """Replay new records; every method of Optuna's storage calls this method.

        A record that cannot be replayed is not skipped: every later call raises the same CheckpointError.
        """
        replayed = self._replay_result
        try:
            with understood(self._backend.path, lambda: replayed.log_number_read):
                super()._sync_with_backend()
        except CheckpointError as error:
            if isinstance(error.__cause__, UNREPLAYABLE):
                replayed.log_number_read -= 1  # Optuna counts a record before replaying it
            raise


class JournalStudyStorage:
    """A study in `<directory>/study.journal`, for the workers of one host."""

    def __init__(self, directory: Path, *, create: bool = True) -> None:
        directory = directory.absolute()
        if create:
            with writing(directory):
                make_folder(directory)
        self._directory = directory
        path = directory / JOURNAL
        self.where, self.study_name, self.spans_hosts = str(path), STUDY, False
        self._storage = _ToldJournal(SafeJournalBackend(path, create=create))

    @property
    def optuna(self) -> BaseStorage:
        """The storage for Optuna."""
        return self._storage

    def lock(self) -> AbstractContextManager[None]:
        """Exclude all other workers of the study while the context lasts. Not reentrant."""
        return folder_locked(self._directory / LOCK)

    def persist(self, operation: Callable[[], T]) -> T:
        """Run an operation on the study, without retries."""
        return operation()

    def take_lease(self, number: int, worker: str) -> FileLease:
        """Take the lease of a candidate before the candidate is recorded. The caller holds the study's lock."""
        path = lease_path(self._directory, number)
        with writing(path):
            return FileLease(path, worker)

    def watch(self, lease_s: float, monotonic: Callable[[], float] = time.monotonic) -> FileLeaseWatch:
        """Return an observer of other workers' leases."""
        return FileLeaseWatch(self._directory, lease_s, monotonic=monotonic)


@contextmanager
def locked(path: Path, *, waiting: Callable[[str], None] = logger.warning) -> Iterator[None]:
    """Hold an exclusive `flock` on `path`, which is created if need be; a dead holder's lock is free at once.

    `waiting` gets a line now and then while somebody else has it for long.
    """
    with held(path, lambda: _open_lock(path), lambda d: _acquire(d, path, waiting)):
        yield


@contextmanager
def folder_locked(
    path: Path, folder: Path | None = None, *, waiting: Callable[[str], None] = logger.warning
) -> Iterator[None]:
    """Hold `locked(path)` and the folder too, so that the lock holds even if another process removes its file.

    The folder is that of the file, unless the lock guards another `folder`; a missing folder is created.
    """
    guarded = folder or path.parent

    def open_guarded() -> int:
        with writing(guarded):
            return open_folder(guarded, create=True).descriptor

    with locked(path, waiting=waiting):
        descriptor, _ = take_folder(open_guarded, lambda d: _acquire(d, path, waiting))
        try:
            yield
        finally:
            os.close(descriptor)


@contextmanager
def locked_if_free(path: Path) -> Iterator[bool]:
    """Take the lock of `locked` if it is free; yield whether it was taken."""
    with held(path, lambda: _open_lock(path)) as free:
        yield free


def _open_lock(path: Path) -> int:
    with writing(path):
        return open_file(path, os.O_RDWR | os.O_CREAT, alone=True)


def _acquire(descriptor: int, path: Path, waiting: Callable[[str], None] = logger.warning) -> bool:
    """Wait for the lock. Holders need milliseconds, so one that takes long is frozen and worth a line."""
    line = f"still waiting for {path}; is the worker that holds it paused (docker pause, SIGSTOP)?"
    return wait_for(
        lambda: try_flock(descriptor), tell=lambda: waiting(line), patience_s=_PATIENCE_S, again_s=_PATIENCE_S
    )


class SafeJournalBackend(BaseJournalBackend):
    """Optuna's journal format, one JSON record per line; killed writers and full disks do not damage the journal."""

    def __init__(self, path: Path, *, create: bool = True) -> None:
        self.path = path.absolute()
        # Number of records read so far, and byte offset of the next record; Optuna only reads forward from there.
        self._seen = (0, 0)
        self._identity: tuple[int, int] | None = None
        """Device and inode of the file that was read."""
        if create and self._is_missing():
            os.close(self._open(os.O_RDWR | os.O_CREAT))
            with writing(self.path):
                fsync_directory(self.path.parent)

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Yield the records from number `log_number_from` on; a line without a line end is not yet complete.

        Raises CheckpointError for a complete line that is not a record, and for a truncated or replaced journal;
        UsageError for a file that never was a journal.
        """
        number, offset = self._seen if self._seen[0] <= log_number_from else (0, 0)
        with open(self._open(os.O_RDONLY), "rb") as file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            if self._identity not in (None, identity):
                raise CheckpointError(
                    f"{self.path}: was repaired or replaced while in use; start the worker again"
                )
            self._identity = identity
            if status.st_size < offset:
                raise CheckpointError(f"{self.path}: was cut short while in use; restore it from a copy")
            file.seek(offset)
            while line := file.readline(MOST_LINE_BYTES + 1):
                if len(line) > MOST_LINE_BYTES:
                    raise self._damaged(number + 1)
                if not line.endswith(b"\n"):
                    if has_lost_line_end(line):
                        raise self._damaged(number + 1)
                    return
                number, offset = number + 1, offset + len(line)
                if number <= log_number_from:
                    continue
                record = self._parse(line, number)
                # Set before the yield: Optuna may stop at this record, and counts it as read.
                self._seen = (number, offset)
                yield record

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append records durably, after removing a partial line of a killed writer.

        Raises DiskFull if the disk is full or fails; the journal is then unchanged.
        """
        payload = b"".join(map(sealed, logs))
        # A repair puts another file in place: whoever waited for it must not write to the one that has gone.
        descriptor, _ = take(self.path, lambda: self._open(os.O_RDWR), lambda d: _acquire(d, self.path))
        try:
            end = _end_of_last_line(descriptor)
            self._refuse_lost_line_end(descriptor, end)
            if end == 0:
                self._refuse_what_is_none(os.pread(descriptor, len(_BEGINNING), 0))
            with writing(self.path):
                self._write(descriptor, payload, end)
        finally:
            os.close(descriptor)

    def _write(self, descriptor: int, payload: bytes, end: int) -> None:
        """Write `payload` at byte `end`; after an error, truncate the file to `end`."""
        if os.fstat(descriptor).st_size > end:
            os.ftruncate(descriptor, end)
        space = os.fstatvfs(descriptor)
        # A full disk is better noticed before the write than after half a record.
        if space.f_bavail * space.f_frsize < len(payload) + space.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = 0
        try:
            while written < len(payload):
                written += os.pwrite(descriptor, payload[written:], end + written)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, end)
            raise
        # After a failed fsync the record stays: other workers may have read it, and removing it would make their
        # view differ from the file. The caller learns from the exception that the record is not safe.
        os.fsync(descriptor)

    def _is_missing(self) -> bool:
        with writing(self.path):
            return state_of(self.path) is None

    def _open(self, flags: int) -> int:
        try:
            return open_file(self.path, flags, alone=flags & os.O_RDWR != 0)
        except OSError as error:
            raise refusal(error, self.path) or CheckpointError(
                f"{self.path}: cannot be opened ({error.strerror}); check that the search's folder is there and "
                "belongs to this user"
            ) from error

    def _refuse_what_is_none(self, first: bytes) -> None:
        """Raise UsageError if the file's only line has no end and is not the beginning of a first record."""
        # After a power failure a file may have its length but zeros as content.
        if not _BEGINNING.startswith(first) and first.strip(b"\0"):
            raise UsageError(self._no_journal())

    def _no_journal(self) -> str:
        return f"{self.path}: exists and is not a study's journal; move it away, or start a search under another --name"

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        record = opened(line)
        if record is None:
            if number == 1 and not looks_like_record(line):
                raise UsageError(self._no_journal())
            raise self._damaged(number)
        return record

    def _damaged(self, number: int) -> CheckpointError:
        return CheckpointError(
            f"{self.path}:{number}: not a record of a study, or a damaged one; to drop it alone: "
            f"starling search repair {self.path.parent}"
        )

    def _refuse_lost_line_end(self, descriptor: int, end: int) -> None:
        """Raise CheckpointError if a complete record without line end and more bytes are behind the last line."""
        tail = os.pread(descriptor, os.fstat(descriptor).st_size - end, end)
        if has_lost_line_end(tail):
            lines = sum(1 for _ in self.read_logs(0)) if end else 0
            raise self._damaged(lines + 1)


def _end_of_last_line(descriptor: int) -> int:
    """Return the offset behind the last newline; 0 if there is none."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(end - _BLOCK, 0)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
