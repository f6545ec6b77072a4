"""Read a large JSON object piece by piece: one member, or one element of a member that is a list, at a time."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from starling.core.budget import BudgetExceeded
from starling.core.files.regular import open_regular
from starling.core.utf8 import HEAD_BYTES, check_utf8

PIECE_CHARACTERS = 8 << 20
"""The largest member or element; as objects of Python it takes up to 44 times as much memory."""
_CHUNK = 1 << 20
_DECODER = json.JSONDecoder()


def members(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of a JSON object at the top of a file; (key, element) for each element of a list there.

    Raises OSError for a file that cannot be read, ValueError for what is no JSON object (NotUtf8 for UTF-16), and BudgetExceeded for a
    piece of over PIECE_CHARACTERS.
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
    """The part of a file's text that is held, and the place in it."""

    def __init__(self, file: io.TextIOWrapper) -> None:
        self._file, self._held, self._at, self._ended = file, "", 0, False

    def take(self, character: str) -> bool:
        """Go past a character if it comes next, blanks before it left out."""
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
        """Go past a character; raises ValueError where another comes next."""
        if not self.take(character):
            raise ValueError(f"no {character!r} where one must stand")

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
            # A number that ends where the held text ends may go on.
            if end < len(self._held) or not self._fill():
                self._at = end
                return value

    def _fill(self) -> bool:
        """Hold more of the file: twice as much of a piece each time, so that trying anew stays cheap."""
        if self._ended:
            return False
        held = len(self._held) - self._at
        if held > PIECE_CHARACTERS:
            raise BudgetExceeded(f"more than {PIECE_CHARACTERS >> 20} million characters of one piece")
        more = self._file.read(max(_CHUNK, held))
        self._held, self._at = self._held[self._at :] + more, 0
        self._ended = not more
        return bool(more)
