"""Read a local replica's log and its rotated predecessors as one stream, oldest first, while they grow and rotate."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from launcher.engines.base import LogLine
from launcher.engines.local.supervisor import LOG_FILES
from starling.core.files.folder import Folder
from starling.core.units import parse_stamp

POLL_S = 0.2
MOST_OF_A_FILE = 32 << 20
"""The most bytes read of one file: the supervisor rotates its log at 10 MiB, so it did not write a longer file."""
_CHUNK = 1 << 20


def read_log(
    path: Path, alive: Callable[[], bool], *, follow: bool, tail: int | None, since: float | None
) -> Iterator[LogLine]:
    """Yield the last `tail` lines from `since` on, and with `follow` all later lines until the replica's end."""
    reader = LogReader(path)
    try:
        follow = follow and alive()
        kept: Iterator[LogLine] = reader.available()
        if not follow:
            kept = _chain(kept, reader)
        if since is not None:
            kept = (line for line in kept if line.at is not None and line.at >= since)
        yield from kept if tail is None else deque(kept, maxlen=tail)
        while follow:
            follow = alive()  # check before reading, else the last lines could be missed
            before = reader.read_bytes
            yield from reader.available()
            if not follow:
                yield from reader.rest()
            elif reader.read_bytes == before:
                time.sleep(POLL_S)
    finally:
        reader.close()


def _chain(lines: Iterator[LogLine], reader: LogReader) -> Iterator[LogLine]:
    yield from lines
    yield from reader.rest()


class LogReader:
    """A position in the sequence FILE.2, FILE.1, FILE, which the writer rotates during the reading."""

    def __init__(self, path: Path) -> None:
        self._names = [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, LOG_FILES))]
        self._file: IO[bytes] | None = None
        self._pending = b""
        self.read_bytes = 0

    def available(self) -> Iterator[LogLine]:
        """Yield every whole line that now exists and was not yielded before."""
        while True:
            if self._file is not None:
                yield from self._read()
            following = self._following()
            if following is None:
                return
            if self._file is not None:
                yield from self._read()  # lines written before the rotation; none follow
                self._file.close()
            self._file = following

    def rest(self) -> Iterator[LogLine]:
        """Yield the last line if it has no line end."""
        if self._pending:
            yield _line(self._pending)
            self._pending = b""

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _read(self) -> Iterator[LogLine]:
        assert self._file is not None
        while self._file.tell() < MOST_OF_A_FILE and (data := self._file.read(_CHUNK)):
            self.read_bytes += len(data)
            *lines, self._pending = (self._pending + data).split(b"\n")
            yield from map(_line, lines)

    def _following(self) -> IO[bytes] | None:
        """Open the next newer file than the current one, or the oldest file at the start; None if there is none."""
        own = None if self._file is None else os.fstat(self._file.fileno())
        newer: IO[bytes] | None = None
        for name in self._names:
            try:
                file = _open(name)
            except OSError:
                continue
            if own is not None and os.path.samestat(os.fstat(file.fileno()), own):
                file.close()
                return newer
            if newer is not None:
                newer.close()
            newer = file
        return newer


def _open(path: Path) -> IO[bytes]:
    """Open a file in a folder that others may write, without following a link and without blocking on a pipe."""
    with Folder.resolve(path.parent.parent) as above, above.folder(path.parent.name) as folder:
        if not stat.S_ISREG(folder.stat(path.name).st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        return open(folder.open(path.name, os.O_RDONLY | os.O_NONBLOCK), "rb")


def _line(line: bytes) -> LogLine:
    text = line.decode(errors="replace").rstrip("\r")
    stamp, _, rest = text.partition(" ")
    at = parse_stamp(stamp)
    return LogLine(text) if at is None else LogLine(rest, at)
