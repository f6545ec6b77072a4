"""Read a container's output as whole lines, each once, even if the stream from the engine breaks off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from launcher.engines.base import LogLine
from starling.core.units import parse_stamp

OVERLAP_S = 0.001
"""A reopened stream starts this much before the last line: floats round, and repeated lines are recognised."""

Frames = Callable[[bool, Mapping[str, Any]], Iterable[bytes]]
"""Opens the stream, following or not, with the options `tail` and `since`; a broken stream ends without an error."""


def read_log(
    open_frames: Frames, runs: Callable[[], bool], *, follow: bool, tail: int | None, since: float | None
) -> Iterator[LogLine]:
    """Yield the last `tail` lines from `since` on, and with `follow` all later lines.

    A broken stream looks like an ended one. `runs` therefore tells whether to reopen the stream; after the replica's
    end, the remaining lines are read once more.
    """
    options: dict[str, Any] = {"tail": "all" if tail is None else tail}
    if since is not None:
        options["since"] = since
    seen = _Seen()
    while True:
        for stamp, text in seen.new(split_lines(open_frames(follow, options))):
            yield LogLine(text, parse_stamp(stamp))
        if not follow:
            return
        follow = runs()
        last = parse_stamp(seen.stamp)
        if last is not None:
            options = {"tail": "all", "since": last - OVERLAP_S}


class _Seen:
    """The time stamp of the last line read, and the number of lines with that same stamp."""

    def __init__(self) -> None:
        self.stamp = ""
        self._alike = 0

    def new(self, lines: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """Yield the lines that were not read before.

        Stamps are compared only at the head of the stream: later lines count as new even if the clock was set back.
        """
        head, until, again = bool(self.stamp), self.stamp, self._alike
        for stamp, text in lines:
            if head and (stamp < until or (stamp == until and again)):
                again -= stamp == until
                continue
            head = False
            self._alike = self._alike + 1 if stamp == self.stamp else 1
            self.stamp = stamp
            yield stamp, text


def split_lines(frames: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """Yield (time stamp, line). The engine splits a long line into stamped parts; only the last has a line end."""
    stamp, parts = "", b""
    for frame in frames:
        *whole, rest = frame.split(b"\n")
        for index, piece in enumerate([*whole, rest]):
            ends = index < len(whole)
            if not ends and not piece:
                continue
            its_stamp, _, text = piece.partition(b" ")
            stamp = stamp or its_stamp.decode(errors="replace")
            parts += text
            if ends:
                yield stamp, _text(parts)
                stamp, parts = "", b""
    if parts:
        yield stamp, _text(parts)


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\r")
