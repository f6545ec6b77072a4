"""Choose one name for all output files of one source: images, films, label files and crops.

The name is the source's file name without suffix, as scripts expect: `labels/a.txt`, `crops/<class>/a.jpg`,
`film_0.txt` for frame 0 of a film. If two sources' files would have the same name, one gets an addition, six digits of
the SHA-256 of its path. The names depend on the paths only, not on the order of the sources.
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
"""Hexadecimal digits of an addition; more if the name with six is taken."""
ROOM = 25
"""Bytes reserved after a name for frame, number of a crop, suffix (`_12345678-1234.jpeg`) and an addition."""

_FRAME = re.compile(r"(.+)_(?:0|[1-9]\d*)", re.DOTALL | re.ASCII)
_NUMBER = re.compile(r"(.+)-(?:[2-9]|[1-9]\d+)", re.DOTALL | re.ASCII)


class Key(NamedTuple):
    """The identity of a name: a film `a` writes `a_0.txt`, an image `a` writes `a.txt`."""

    film: bool
    base: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """The properties of a source that determine the names of its files."""

    identity: str
    """The absolute path, or the address without user and password."""
    file_name: str
    """One path component; the names omit its suffix."""
    film: bool = False
    """Whether the source has several frames, each with its own files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """The names of one source's files."""

    base: str
    film: bool
    addition: str = ""
    """Text before the number of a second crop, if `BASE-2` is the name of another source."""

    def stem(self, frame: int) -> str:
        """Return the name, without suffix, of the files of an image or of one frame."""
        return f"{self.base}_{frame}" if self.film else self.base

    def crop(self, frame: int, number: int) -> str:
        """Return the name, without suffix, of the `number`-th crop, from 1, of one class in an image or frame."""
        stem = self.stem(frame)
        return stem if number == 1 else f"{stem}{self.addition}-{number}"


def subjects_of(paths: Iterable[Path]) -> list[Subject]:
    """Return image files as sources; a file that is given twice counts as two."""
    return numbered([Subject(identity=os.path.abspath(path), file_name=path.name) for path in paths])


def numbered(subjects: Sequence[Subject]) -> list[Subject]:
    """Return the sources with distinct identities: a repeated identity gets a number."""
    seen: dict[str, int] = {}
    result = []
    for one in subjects:
        seen[one.identity] = number = seen.get(one.identity, 0) + 1
        identity = one.identity if number == 1 else f"{one.identity}\n{number}"
        result.append(Subject(identity=identity, file_name=one.file_name, film=one.film))
    return result


@dataclass(slots=True)
class Names:
    """Gives each source a unique name; names given before are kept."""

    longest: int = NAME_MAX
    """The longest file name of the file system in bytes."""
    folds: bool = False
    """Whether the file system treats `A` and `a` as the same name."""
    given: dict[str, Named] = field(default_factory=dict)
    """The names given, by identity."""
    _keys: dict[Key, str | None] = field(default_factory=dict)
    """Names in use, with the addition of their second crops; None: not known yet, or not of a source."""
    _framed: set[str] = field(default_factory=set)
    """Names that a film must not have, because an image is named like one of its frames."""
    _numbered: set[Key] = field(default_factory=set)
    """Names whose second crop would have the name of another image."""

    def reserve(self, stem: str, *, film: bool = False) -> None:
        """Reserve a name, because a file of an unknown source has it."""
        self._take(Key(film, self._fold(stem)), None)

    def record(self, identity: str, named: Named) -> None:
        """Keep a name that an earlier run gave, unless it conflicts with another name."""
        key = Key(named.film, self._fold(named.base))
        if identity not in self.given and self._is_free(key):
            self._take(key, named.addition)
            self.given[identity] = named

    def give(self, subjects: Iterable[Subject]) -> None:
        """Name sources of different identities; all sources with a free plain name get it before additions are made."""
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
        """Return the key of the source that writes files called `stem`; None if there is none."""
        for key, addition in self._readings(self._fold(stem)):
            if key in self._keys and (addition is None or addition == self._keys[key]):
                return key
        return None

    def has(self, key: Key) -> bool:
        """Return whether a source has this key."""
        return key in self._keys

    def key(self, named: Named) -> Key:
        """Return the key of `named`."""
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
        """Yield the keys of sources that may write a file called `stem`, each with the addition needed (None: any)."""
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
    """Return unique class names: an equal or reserved name is followed by the number of its class.

    `numbers` are the numbers of the classes, if they differ from the positions.
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
    """Return the common form of names that a case-insensitive file system treats as equal."""
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
    """Return the beginning of a name in at most `size` bytes, made of whole characters."""
    if len(os.fsencode(text)) <= size:
        return text
    while len(os.fsencode(text)) > size:
        text = text[: max(len(text) - max((len(os.fsencode(text)) - size) // 4, 1), 0)]
    return text
