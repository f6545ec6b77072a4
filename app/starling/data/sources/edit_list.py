"""How much of an MP4 or QuickTime video is shown: a phone that trims a video keeps all frames and writes an edit list.

Source of the boxes: ISO/IEC 14496-12, 8.2.2 (mvhd), 8.6.6 (elst).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO

MAX_BYTES = 64 << 20
"""Maximum size of a `moov` box, which describes a video; a larger box is not read."""
MOST_BOXES = 10_000
_NOTHING_SHOWN = -1
"""`media_time` of an edit that shows nothing."""


def shown_seconds(path: Path) -> float | None:
    """Return the seconds of the first video track that a video shows; None if no edit list says so."""
    try:
        with open(path, "rb") as file:
            movie = _movie(file)
        for track in _inside(movie, b"trak"):
            handlers = [box for media in _inside(track, b"mdia") for box in _inside(media, b"hdlr")]
            if any(handler[8:12] == b"vide" for handler in handlers):
                edits = [box for edit in _inside(track, b"edts") for box in _inside(edit, b"elst")]
                return sum(map(_edited, edits)) / _time_scale(movie) if edits else None
    except (OSError, struct.error, ValueError, IndexError, ZeroDivisionError, StopIteration):
        pass  # a damaged file, or another kind of file
    return None


def _movie(file: IO[bytes]) -> bytes:
    """Return the content of the `moov` box; raises ValueError if there is none."""
    size = file.seek(0, os.SEEK_END)
    at = 0
    for _ in range(MOST_BOXES):
        file.seek(at)
        length, kind = struct.unpack(">I4s", file.read(8))
        head = 8
        if length == 1:
            (length,), head = struct.unpack(">Q", file.read(8)), 16
        length = length or size - at
        if kind == b"moov" and length <= MAX_BYTES:
            return file.read(length - head)
        if length < head:
            break
        at += length
    raise ValueError("no moov box")


def _inside(content: bytes, wanted: bytes) -> Iterator[bytes]:
    """Yield the content of the boxes of one kind at the top level of `content`."""
    at = 0
    for _ in range(MOST_BOXES):
        if at + 8 > len(content):
            return
        length, kind = struct.unpack_from(">I4s", content, at)
        if length < 8:
            return
        if kind == wanted:
            yield content[at + 8 : at + length]
        at += length


def _time_scale(movie: bytes) -> int:
    """Return the number of time units per second in which edits are measured."""
    header = next(_inside(movie, b"mvhd"))
    (scale,) = struct.unpack_from(">I", header, 20 if header[0] == 1 else 12)
    return int(scale)


def _edited(edits: bytes) -> int:
    """Return the total length of all edits that show something, in units of the movie's time scale."""
    version, count = edits[0], struct.unpack_from(">I", edits, 4)[0]
    layout = struct.Struct(">QqI" if version == 1 else ">IiI")
    rows = (layout.unpack_from(edits, 8 + number * layout.size) for number in range(min(count, MOST_BOXES)))
    return sum(length for length, media_time, _ in rows if media_time != _NOTHING_SHOWN)
