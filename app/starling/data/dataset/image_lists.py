"""Find the images of a split: in folders, in lists, or named one by one."""

from __future__ import annotations

import io
import math
import os
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from starling.core.budget import Budget, BudgetExceeded
from starling.core.dataset import OWN, find_entry
from starling.core.errors import DataError
from starling.core.files.kinds import (
    IMAGE_SUFFIXES,
    UNREAD_IMAGE_SUFFIXES,
    is_hidden,
    is_hidden_copy,
    suffix_of,
)
from starling.core.files.regular import exists, is_file, is_folder, open_regular
from starling.core.paths import parts_of, tails, written
from starling.core.places import look_at
from starling.core.utf8 import HEAD_BYTES, NotUtf8, check_utf8
from starling.data.dataset.findings import Finding
from starling.data.dataset.left_out import LeftOut

_MAX_LIST_BYTES = 256 << 20
_MAX_LINES = 4_000_000
_MAX_NAME = 16 << 10
"""Maximum length of a line in characters; no file system allows a path of a quarter of this length."""
_MOST_LOOKED_AT = 100_000
"""Number of files that the search for a misplaced name looks at."""


@dataclass(slots=True)
class FoundImages:
    """The images of a split, and what the search for them left out."""

    images: list[Path] = field(default_factory=list)
    """Image paths, sorted, without repetitions."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """Images in formats that are not read."""
    absent: list[Finding] = field(default_factory=list)
    """One finding for each list that names missing images."""
    absent_count: int = 0
    notes: list[Finding] = field(default_factory=list)
    """Lists whose entries were found at other paths than written."""


def find_images(entries: Iterable[Path], root: Path, source: str) -> FoundImages:
    """Return the images of a split's entries; relative paths in lists may start from `root`.

    Raises DataError, with a message that begins with `source`, for an entry that does not exist or cannot be listed;
    PermissionError for an entry in a folder without read permission.
    """
    found = FoundImages()
    for entry in entries:
        suffix = suffix_of(entry.name)
        if is_folder(entry):
            _walk(entry, found)
        elif suffix == ".txt" and is_file(entry):
            _read_list(entry, root, source, found)
        elif suffix in IMAGE_SUFFIXES and is_file(entry):
            found.images.append(entry)
        elif suffix in UNREAD_IMAGE_SUFFIXES and is_file(entry):
            found.left_out.add_unread_image(entry)
        else:
            raise DataError(f"{source}: {_why_not(entry, root)}")
    found.images = sorted(dict.fromkeys(found.images))
    return found


def _why_not(entry: Path, root: Path) -> str:
    """Return what is wrong with an entry that is neither a folder, a list nor an image, and the remedy."""
    place = look_at(entry)
    if place is None:
        likely = likely_path(str(entry.relative_to(root) if entry.is_relative_to(root) else entry), root)
        remedy = f"{likely} is there: write that" if likely else "put the images there or fix the path"
        return f"{entry} is not there; {remedy}"
    if place.kind == "archive":
        return f"{entry} is {place.words}; unpack it, and name the folder with its images here"
    return f"{entry} is {place.words}, not a folder of images, a .txt list or an image; name one of these"


def likely_path(entry: str, root: Path) -> Path | None:
    """Return where a missing entry may be: below `root` with fewer leading folders, or in another case."""
    below = next((root / tail for tail in tails(entry) if exists(root / tail)), None)
    if below is not None:
        return below
    return next((one for tail in tails(entry) if (one := _in_any_case(root, tail.split("/")))), None)


def _in_any_case(root: Path, parts: list[str]) -> Path | None:
    for part in parts:
        try:
            names = [name for name in os.listdir(root) if _folded(name) == _folded(part)]
        except OSError:
            return None
        if len(names) != 1:
            return None
        root = root / names[0]
    return root


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _walk(folder: Path, found: FoundImages) -> None:
    """Add the images under `folder`, following links to folders; skip hidden files, and visit each real folder once."""
    seen: set[str] = set()
    for current, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        real = os.path.realpath(current)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in sorted(files):  # sorted: the first left-out file is the same on every machine
            suffix = suffix_of(name)
            if suffix in IMAGE_SUFFIXES:
                if not is_hidden(name):
                    found.images.append(Path(current, name))
            elif suffix in UNREAD_IMAGE_SUFFIXES and not is_hidden(name):
                found.left_out.add_unread_image(Path(current, name))


def _refuse(error: OSError) -> None:
    """Raise the error that keeps a folder from being listed: without its images the dataset would be another one."""
    if not isinstance(error, FileNotFoundError):  # the folder may have been removed since it was listed
        raise error


def _read_list(path: Path, root: Path, source: str, found: FoundImages) -> None:
    """Add the images that a list names: absolute, or relative to the list's folder, or else to the root.

    If no entry of a list exists, as in a list from another machine, leading folders are dropped from all entries,
    provided that all images are then found. Missing entries are one finding; raises DataError if no entry is found.
    """
    bases = tuple(dict.fromkeys((path.parent, root)))
    there: list[Path] = []
    absent: list[tuple[int, str]] = []
    for number, name in _entries(path):
        image = next((one for one in _meant(name, bases) if exists(one)), None)
        if image is None and name.startswith("#"):
            continue  # a comment
        if image is None:
            absent.append((number, name))
        else:
            there.append(Path(os.path.normpath(image)))
    if absent and not there:
        there, absent = _elsewhere(path, bases, absent, found)
    if absent:
        finding = _absent(path, bases, absent, len(absent) + len(there))
        if not there:
            raise DataError(f"{source}: {finding}")
        found.absent.append(finding)
        found.absent_count += len(absent)
    for image in there:
        if suffix_of(image.name) in UNREAD_IMAGE_SUFFIXES:
            found.left_out.add_unread_image(image)
        else:
            found.images.append(image)


def _entries(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line number and text of a list's entries, without hidden copies."""
    budget = Budget(seconds=math.inf, list_bytes=_MAX_LIST_BYTES, lines=_MAX_LINES)
    number = 0
    try:
        with open_regular(path) as file:
            check_utf8(file.read(HEAD_BYTES), path)
            file.seek(0)
            text = io.TextIOWrapper(file, "utf-8-sig")
            while line := text.readline(_MAX_NAME):
                budget.spend(list_bytes=len(line), lines=1)
                if len(line) == _MAX_NAME:
                    raise BudgetExceeded(f"a line of more than {_MAX_NAME:,} characters")
                number, name = number + 1, line.strip()
                if name and "\0" not in name and not is_hidden_copy(name):
                    yield number, name
    except BudgetExceeded as error:
        raise DataError(f"{path}: {error}, so not a list of images; check the path") from None
    except NotUtf8 as error:
        raise DataError(f"{path}: {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read as text: {error}; check the file") from None


def _meant(name: str, bases: Iterable[Path]) -> Iterator[Path]:
    """Yield the paths that an entry of a list may refer to."""
    for spelling in written(name):
        for base in bases:
            yield base / spelling


def _elsewhere(
    path: Path, bases: Iterable[Path], absent: list[tuple[int, str]], found: FoundImages
) -> tuple[list[Path], list[tuple[int, str]]]:
    """Return the images of a list after dropping leading folders from all entries, and the entries still absent.

    At least a folder and a name remain of each entry, so that images of equal name in two folders are not mixed up.
    """
    first = parts_of(absent[0][1])
    for base in bases:
        for drop in range(len(first) - 1):
            if not exists(base.joinpath(*first[drop:])):
                continue
            images = [base.joinpath(*parts_of(name)[drop:]) for _, name in absent]
            if all(len(parts_of(name)) > drop + 1 for _, name in absent) and all(map(exists, images)):
                left = "/".join(first[:drop]) or "the root"
                problem = f"its {len(images)} entries are found in {base} without {left!r} in front"
                found.notes.append(Finding(str(path), None, problem, "nothing, or write them so"))
                return images, []
    return [], absent


def _absent(path: Path, bases: Iterable[Path], absent: list[tuple[int, str]], total: int) -> Finding:
    """Return one finding for all missing entries of a list, with a likely place of the first one."""
    number, name = absent[0]
    tried = " or ".join(map(str, bases))
    likely = next((one for base in bases if (one := likely_path(name, base))), None)
    if likely is None:
        likely = next(
            (one for base in bases if (one := _by_name(base, (parts_of(name) or [name])[-1]))), None
        )
    remedy = (
        f"{likely} may be meant: correct the list's paths"
        if likely
        else "correct the list, or put them there"
    )
    return Finding(
        str(path),
        number,
        f"{len(absent)} of {total} entries are not there, first {name!r} (from {tried})",
        remedy,
    )


def _by_name(folder: Path, name: str) -> Path | None:
    """Return the only file of this name below a folder; None for no or several files, or too many to search."""
    matches: list[Path] = []
    looked_at = 0
    for current, folders, files in os.walk(folder):
        folders[:] = sorted(one for one in folders if not is_hidden(one))
        looked_at += len(files) + len(folders)
        if name in files:
            matches.append(Path(current, name))
        if looked_at > _MOST_LOOKED_AT or len(matches) > 1:
            return None
    return matches[0] if matches else None


def locate(root: Path, entry: str) -> Path:
    """Return the path that an entry of a description refers to; if nothing is there, the path as written."""
    return find_entry(root, entry, OWN) or OWN.expand(root, entry)
