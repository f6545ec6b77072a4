"""Files of annotations: recognise the format from the first and last bytes; read a large JSON object piece by piece."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any, Literal

from starling.core.budget import BudgetExceeded
from starling.core.files.regular import open_regular
from starling.core.utf8 import HEAD_BYTES, check_utf8

_SNIFFED = 64 << 10
"""Number of bytes at the beginning and at the end of a file that are read to recognise the format."""


def kind_of_xml(path: Path) -> Literal["voc", "cvat"] | None:
    """Return the format of an XML file of annotations; None for other XML."""
    text = _ends(path)
    if b"<annotations" in text and b"<image" in text:
        return "cvat"
    return "voc" if b"<annotation" in text else None


def kind_of_json(path: Path) -> Literal["coco", "labelme", "other"] | None:
    """Return the format of a JSON file of annotations; None for other JSON."""
    keys = set(re.findall(rb'"(\w+)"\s*:', _ends(path)))
    if (
        {b"annotations", b"images"} <= keys
        or {b"annotations", b"categories"} <= keys
        or {b"bbox", b"image_id"} <= keys
    ):
        return "coco"
    if b"shapes" in keys and {b"imagePath", b"shape_type", b"imageHeight"} & keys:
        return "labelme"
    known = {
        b"_via_img_metadata",
        b"regions",
        b"annotations",
        b"completed_by",
        b"objects",
        b"labels",
        b"boxes",
        b"bbox",
    }
    return "other" if known & keys else None


def table_columns(path: Path) -> set[str]:
    """Return the columns of a table whose heading names images and boxes; an empty set for other tables."""
    text = _ends(path)[:_SNIFFED].decode("utf-8-sig", "replace")
    try:
        heading = next(
            csv.reader(io.StringIO(text), delimiter="\t" if "\t" in text.split("\n")[0] else ","), []
        )
    except csv.Error:
        return set()
    columns = {column.strip() for column in heading}
    words = " ".join(columns).casefold()
    names_boxes = re.search(r"x_?min|xmax|bbox|box|width|x_?center|\bx1?\b|left", words)
    return columns if names_boxes and re.search(r"image|file|img|path|name|\bid\b|patient", words) else set()


def _ends(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            head = file.read(_SNIFFED)
            size = file.seek(0, 2)
            file.seek(max(size - _SNIFFED, len(head)))
            return head + file.read(_SNIFFED)
    except OSError:
        return b""


PIECE_CHARACTERS = 8 << 20
"""Maximum characters of a member or element; as Python objects it takes up to 44 times as much memory."""
_CHUNK = 1 << 20
_DECODER = json.JSONDecoder()


def members(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of the JSON object in a file, and (key, element) for each element of a list among the values.

    Raises OSError for an unreadable file, ValueError for a file that is no JSON object (NotUtf8 for UTF-16), and
    BudgetExceeded for a piece of over PIECE_CHARACTERS.
    """
    with open_regular(path) as file:
        check_utf8(file.read(HEAD_BYTES), path)
        file.seek(0)
        text = _Text(io.TextIOWrapper(file, "utf-8-sig"))
        text.expect("{")
        if text.take("}"):
            return
        while True:
            key = text.value()
            if not isinstance(key, str):
                raise ValueError(f"a key is {str(key)[:40]}")
            text.expect(":")
            if text.take("["):
                yield from ((key, element) for element in _elements(text))
            else:
                yield key, text.value()
            if text.take("}"):
                return
            text.expect(",")


def _elements(text: _Text) -> Iterator[Any]:
    if text.take("]"):
        return
    while True:
        yield text.value()
        if text.take("]"):
            return
        text.expect(",")


class _Text:
    """The part of a file's text that is in memory, and the reading position."""

    def __init__(self, file: io.TextIOWrapper) -> None:
        self._file, self._held, self._at, self._ended = file, "", 0, False

    def take(self, character: str) -> bool:
        """Skip blanks, and go past `character` if it comes next; return whether it came."""
        while True:
            while self._at < len(self._held) and self._held[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._held):
                break
            if not self._fill():
                return False
        found = self._held[self._at] == character
        self._at += found
        return found

    def expect(self, character: str) -> None:
        """Go past `character`; raises ValueError if another character comes next."""
        if not self.take(character):
            raise ValueError(f"{character!r} is missing")

    def value(self) -> Any:
        """Return the value that comes next."""
        self.take("")
        while True:
            try:
                value, end = _DECODER.raw_decode(self._held, self._at)
            except JSONDecodeError:
                if not self._fill():
                    raise
                continue
            except RecursionError:
                raise ValueError("it is nested too deep") from None
            # A number at the end of the text in memory may continue in the file.
            if end < len(self._held) or not self._fill():
                self._at = end
                return value

    def _fill(self) -> bool:
        """Read more of the file: each time as much as is held, so that decoding a piece anew stays cheap."""
        if self._ended:
            return False
        held = len(self._held) - self._at
        if held > PIECE_CHARACTERS:
            raise BudgetExceeded(f"more than {PIECE_CHARACTERS >> 20} million characters of one piece")
        more = self._file.read(max(_CHUNK, held))
        self._held, self._at = self._held[self._at :] + more, 0
        self._ended = not more
        return bool(more)
