"""Where the pictures of a split are: in folders, in lists, or named one by one."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from app.core.budget import Budget, BudgetExceeded
from app.core.file_kinds import IMAGE_SUFFIXES
from app.core.regular_file import found, is_file, is_folder, open_regular
from app.errors import DataError

_MAX_LIST_BYTES = 256 << 20
_MAX_LINES = 4_000_000
_MAX_NAME = 16 << 10
"""Characters of a line; no file system takes a quarter of it."""


def find_pictures(entries: Iterable[Path], root: Path, source: str) -> Iterator[Path]:
    """Yield the pictures of a split's entries; lists may name theirs from `root`.

    Raises DataError for what is not there or cannot be listed, beginning with `source`; PermissionError for an entry
    in a folder that may not be looked into.
    """
    for entry in entries:
        if is_folder(entry):
            yield from _walk(entry)
        elif entry.suffix.lower() == ".txt" and is_file(entry):
            yield from _listed(entry, root)
        elif entry.suffix.lower() in IMAGE_SUFFIXES and is_file(entry):
            yield entry
        else:
            raise DataError(f"{source}: {entry} is not there; put the pictures there or fix the path")


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the pictures under `folder`, following links to folders, each real folder once."""
    seen: set[str] = set()
    for current, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        real = os.path.realpath(current)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in files:
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                yield Path(current, name)


def _refuse(error: OSError) -> None:
    """Raise what keeps a folder from being listed: without its pictures this would be another dataset."""
    if not isinstance(error, FileNotFoundError):  # it has gone since it was seen
        raise error


def _listed(path: Path, root: Path) -> Iterator[Path]:
    """Yield the pictures that a list names: absolute, or relative to the list's folder, else to the root."""
    budget = Budget(seconds=math.inf, list_bytes=_MAX_LIST_BYTES, lines=_MAX_LINES)
    try:
        with open_regular(path) as file:
            text = io.TextIOWrapper(file, "utf-8-sig")
            while line := text.readline(_MAX_NAME):
                budget.spend(list_bytes=len(line), lines=1)
                if len(line) == _MAX_NAME:
                    raise BudgetExceeded(f"a line of more than {_MAX_NAME:,} characters")
                name = line.strip()
                if name and "\0" not in name:
                    beside = path.parent / name
                    yield Path(os.path.normpath(beside if found(beside) else root / name))
    except BudgetExceeded as error:
        raise DataError(f"{path}: {error}, so not a list of pictures; check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read as text: {error}; check the file") from None
