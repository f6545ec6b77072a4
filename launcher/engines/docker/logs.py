"""A container's output as whole lines, each once, however often the stream to the engine breaks off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from launcher.engines.base import LogLine
from starling.core.instants import parse_stamp

OVERLAP_S = 0.001
"""A stream is taken up again a little before its last line: floats round, and what comes twice is recognised."""

Frames = Callable[[bool, Mapping[str, Any]], Iterable[bytes]]
"""Opens the stream: follow or not, with `tail` and `since`; ends without a word where it breaks off."""


def read_log(
    open_frames: Frames, runs: Callable[[], bool], *, follow: bool, tail: int | None, since: float | None
) -> Iterator[LogLine]:
    """Yield the lines from `since` on, the last `tail` of them, and with `follow` those to come.

    A stream that broke looks like one that ended, so `runs` is asked; and after the end what is left is read.
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
    """The last line that was read: by its time stamp, and how many lines had that very stamp."""

    def __init__(self) -> None:
        self.stamp = ""
        self._alike = 0

    def new(self, lines: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """Yield the lines that were not read before.

        Only at the head are stamps compared: a clock that was set back must not hide what is said from then on.
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
    """Yield (time stamp, line). A long line comes in parts, each with a stamp of its own and no end but the last."""
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
