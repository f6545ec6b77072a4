"""One name for all that a command writes of one source: images, films, label files and crops.

A source is called by its file name without suffix, which is what scripts expect: `labels/a.txt`, `crops/<class>/a.jpg`,
`film_0.txt` for frame 0 of a film. A source whose files would meet another's gets an addition, six digits of the SHA-256
of its path: which one, and whatever the order of the sources, depends on the paths alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from starling.core.files.file_system import NAME_MAX

DIGITS = 6
"""Hexadecimal digits of an addition; more where six are taken."""
ROOM = 25
"""Bytes that a name leaves for the frame, the number of a crop and the suffix: `_12345678-1234.jpeg` and an addition."""

_FRAME = re.compile(r"(.+)_(?:0|[1-9]\d*)", re.DOTALL | re.ASCII)
_NUMBER = re.compile(r"(.+)-(?:[2-9]|[1-9]\d+)", re.DOTALL | re.ASCII)


class Key(NamedTuple):
    """What tells named sources apart: a film `a` writes `a_0.txt`, an image `a` writes `a.txt`."""

    film: bool
    base: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A source, as far as its files' names depend on it."""

    identity: str
    """Absolute path, or the address without user and password."""
    file_name: str
    """One path component; its suffix, if any, is left out of the names."""
    film: bool = False
    """Several frames, each with files of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """The names of one source's files."""

    base: str
    film: bool
    addition: str = ""
    """Stands before the number of a second crop where `BASE-2` is another source's."""

    def stem(self, frame: int) -> str:
        """Return the name of an image's files, or of those of one frame, without suffix."""
        return f"{self.base}_{frame}" if self.film else self.base

    def crop(self, frame: int, number: int) -> str:
        """Return the name, without suffix, of the `number`-th crop, from 1, of one class in an image or frame."""
        stem = self.stem(frame)
        return stem if number == 1 else f"{stem}{self.addition}-{number}"


def subjects_of(paths: Iterable[Path]) -> list[Subject]:
    """Return image files as sources; one that is named twice counts as two."""
    return numbered([Subject(identity=os.path.abspath(path), file_name=path.name) for path in paths])


def numbered(subjects: Sequence[Subject]) -> list[Subject]:
    """Return the same sources, the second of one identity told from the first."""
    seen: dict[str, int] = {}
    result = []
    for one in subjects:
        seen[one.identity] = number = seen.get(one.identity, 0) + 1
        identity = one.identity if number == 1 else f"{one.identity}\n{number}"
        result.append(Subject(identity=identity, file_name=one.file_name, film=one.film))
    return result


@dataclass(slots=True)
class Names:
    """Give each source a name that no other has; names given before are kept."""

    longest: int = NAME_MAX
    """Bytes of a file name that the file system takes."""
    folds: bool = False
    """Whether the file system takes `A` and `a` for one name."""
    given: dict[str, Named] = field(default_factory=dict)
    """By identity."""
    _keys: dict[Key, str | None] = field(default_factory=dict)
    """Names in use, with the addition of their second crops; None: not known yet, or no source's."""
    _framed: set[str] = field(default_factory=set)
    """Names that a film may not have, as an image is called like one of its frames."""
    _numbered: set[Key] = field(default_factory=set)
    """Names whose second crop would be called like another image."""

    def reserve(self, stem: str, *, film: bool = False) -> None:
        """Keep a name from being given: a file of it, of no known source, is there."""
        self._take(Key(film, self._fold(stem)), None)

    def record(self, identity: str, named: Named) -> None:
        """Take a name that was given before; one that meets another's is not kept."""
        key = Key(named.film, self._fold(named.base))
        if identity not in self.given and self._is_free(key):
            self._take(key, named.addition)
            self.given[identity] = named

    def give(self, subjects: Iterable[Subject]) -> None:
        """Name sources of different identities; those whose plain name is free get it before any addition is made."""
        wanted = sorted((one for one in subjects if one.identity not in self.given), key=_order)
        late = []
        chosen: list[tuple[Subject, str]] = []
        for one in wanted:
            base = self._plain(one)
            key = Key(one.film, self._fold(base))
            if self._is_free(key):
                self._take(key, None)
                chosen.append((one, base))
            else:
                late.append(one)
        chosen += [(one, self._with_addition(one)) for one in late]
        for one, base in chosen:
            key = Key(one.film, self._fold(base))
            addition = f"-{_digest(one.identity)[:DIGITS]}" if key in self._numbered else ""
            self._keys[key] = addition
            self.given[one.identity] = Named(base=base, film=one.film, addition=addition)

    def owner(self, stem: str) -> Key | None:
        """Return the name in use whose source writes files called `stem`, if there is one."""
        for key, addition in self._readings(self._fold(stem)):
            if key in self._keys and (addition is None or addition == self._keys[key]):
                return key
        return None

    def has(self, key: Key) -> bool:
        """Return whether a source of that name is known."""
        return key in self._keys

    def key(self, named: Named) -> Key:
        """Return what `owner` returns for the files of `named`."""
        return Key(named.film, self._fold(named.base))

    def _plain(self, subject: Subject) -> str:
        stem = Path(subject.file_name).stem or "source"
        room = self.longest - ROOM
        if len(os.fsencode(stem)) <= room:
            return stem
        addition = f"-{_digest(subject.file_name)[:DIGITS]}"
        return cut(stem, room - len(addition)) + addition

    def _with_addition(self, subject: Subject) -> str:
        digest = _digest(subject.identity)
        for digits in range(DIGITS, len(digest) + 1):
            addition = f"-{digest[:digits]}"
            base = cut(self._plain(subject), self.longest - ROOM - len(addition)) + addition
            key = Key(subject.film, self._fold(base))
            if self._is_free(key):
                self._take(key, None)
                return base
        raise AssertionError("two sources of one identity")

    def _is_free(self, key: Key) -> bool:
        if key in self._keys:
            return False
        if key.film:
            return key.base not in self._framed
        return all(
            other not in self._keys or (addition is not None and self._keys[other] != addition)
            for other, addition in self._readings(key.base)
            if other != key
        )

    def _take(self, key: Key, addition: str | None) -> None:
        self._keys[key] = addition
        if key.film:
            return
        if framed := _FRAME.fullmatch(key.base):
            self._framed.add(framed[1])
        self._numbered.update(other for other, crop in self._readings(key.base) if crop == "")

    def _readings(self, stem: str) -> Iterator[tuple[Key, str | None]]:
        """Yield the sources that may write a file called `stem`, with the addition they would need (None: any)."""
        yield from ((key, None) for key in _bare(stem))
        if number := _NUMBER.fullmatch(stem):
            yield from ((key, "") for key in _bare(number[1]))
            head, dash, digest = number[1].rpartition("-")
            if dash and re.fullmatch(rf"[0-9a-f]{{{DIGITS}}}", digest):
                yield from ((key, f"-{digest}") for key in _bare(head))

    def _fold(self, text: str) -> str:
        return folded(text) if self.folds else text


def distinct(
    names: Sequence[str],
    *,
    numbers: Sequence[int] | None = None,
    fold: Callable[[str], str] = str,
    reserved: Iterable[str] = (),
) -> tuple[str, ...]:
    """Return class names that all differ: those of equal or reserved names get the number of their class.

    `numbers` are the classes' numbers, where they are not those of the positions.
    """
    counts = Counter(map(fold, names))
    counts.update(map(fold, reserved))
    taken = set(counts)
    result = []
    for index, name in zip(numbers or range(len(names)), names, strict=True):
        if counts[fold(name)] > 1:
            name = f"{name} {index}"
            while fold(name) in taken:
                name += f" {index}"
            taken.add(fold(name))
        result.append(name)
    return tuple(result)


def folded(text: str) -> str:
    """Return what names that such a file system does not tell apart have in common."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def _bare(stem: str) -> Iterator[Key]:
    yield Key(False, stem)
    if frame := _FRAME.fullmatch(stem):
        yield Key(True, frame[1])


def _order(subject: Subject) -> tuple[str, str]:
    return subject.identity, subject.file_name


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()


def cut(text: str, size: int) -> str:
    """Return the beginning of a name in at most `size` bytes, no letter cut in two."""
    if len(os.fsencode(text)) <= size:
        return text
    while len(os.fsencode(text)) > size:
        text = text[: max(len(text) - max((len(os.fsencode(text)) - size) // 4, 1), 0)]
    return text
