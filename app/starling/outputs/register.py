"""The register of a run folder, `outputs.json`: it maps sources to the names of their files, also of earlier runs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from starling.core.files.atomic import write_atomic
from starling.core.files.file_system import folds_names, longest_name
from starling.core.plain_json import read_json
from starling.outputs.names import Key, Named, Names, Subject, folded

REGISTER = "outputs.json"
MAX_BYTES = 256 << 20
"""The largest register that is read."""
ANNOTATED = frozenset((".jpg", ".jpeg", ".png", ".mp4"))
"""Suffixes of annotated images and films."""

Kind = Literal["labels", "crops", "annotated", "downloads"]


class Register:
    """The names of all sources of a run folder. Names from an earlier run into the same folder are kept."""

    def __init__(self, folder: Path, subjects: Sequence[Subject]) -> None:
        """Name `subjects` after reading the contents of `folder`; writes nothing.

        Raises OSError if the folder cannot be read.
        """
        self.path = folder / REGISTER
        recorded = _read(self.path)
        files = list(_files(folder))
        self.folds = _folds(folder, (subjects, recorded, files))
        """Whether the file system treats `A` and `a` as the same name."""
        self._names = Names(longest=longest_name(folder), folds=self.folds)
        for identity, named in recorded.items():
            self._names.record(identity, named)
        self._earlier: dict[tuple[Kind, Key], list[Path]] = {}
        strangers = [one for one in files if not self._is_known(*one)]
        for _, path in strangers:
            self._names.reserve(path.stem, film=path.suffix == ".mp4")
        self._names.give(subjects)
        self._subjects = {one.identity: one for one in subjects}
        self._current = {self._names.key(self._names.given[identity]) for identity in self._subjects}

    def of(self, subject: Subject) -> Named:
        """Return the names of one source's files."""
        return self._names.given[subject.identity]

    def write(self) -> None:
        """Replace the folder's `outputs.json`, which lists every source of this and earlier runs with its name."""
        rows = [
            {"source": identity, "name": named.base, "film": named.film, "crop_addition": named.addition}
            for identity, named in sorted(self._names.given.items())
        ]
        write_atomic(self.path, json.dumps({"sources": rows}, indent=1))

    def remove_earlier(self, named: Named, kinds: Iterable[Kind]) -> None:
        """Remove files of these kinds that an earlier run into this folder wrote for the same source."""
        for kind in kinds:
            for path in self._earlier.pop((kind, self._names.key(named)), ()):
                path.unlink(missing_ok=True)

    def is_of_this_run(self, stem: str) -> bool:
        """Return whether a file called `stem` belongs to a source of this run."""
        return self._names.owner(stem) in self._current

    @property
    def renamed(self) -> list[dict[str, str]]:
        """The sources of this run whose names differ from their plain file names, with these names."""
        return [
            {"source": identity, "name": self._names.given[identity].base}
            for identity, subject in self._subjects.items()
            if self._names.given[identity].base != Path(subject.file_name).stem
        ]

    def _is_known(self, kind: Kind, path: Path) -> bool:
        """Assign a file to a recorded source; return False if it belongs to none."""
        if kind in ("labels", "crops"):
            owner = self._names.owner(path.stem)
        else:  # one file per source, so names have no numbers
            films = {"annotated": (path.suffix == ".mp4",), "downloads": (False, True)}[kind]
            keys = (self._names.key(Named(base=path.stem, film=film)) for film in films)
            owner = next(filter(self._names.has, keys), None)
        if owner is not None:
            self._earlier.setdefault((kind, owner), []).append(path)
        return owner is not None


def _folds(folder: Path, known: tuple[Sequence[Subject], dict[str, Named], list[tuple[Kind, Path]]]) -> bool:
    """Return whether the file system ignores case; tests it only if some names differ in nothing else."""
    subjects, recorded, files = known
    stems = {Path(one.file_name).stem for one in subjects} | {one.base for one in recorded.values()}
    stems |= {path.stem for _, path in files}
    return len({folded(stem) for stem in stems}) < len(stems) and folds_names(folder)


def _files(folder: Path) -> Iterator[tuple[Kind, Path]]:
    """Yield the files in a run folder that are named after sources, in a fixed order."""
    for path in _listed(folder):
        if path.suffix.lower() in ANNOTATED:
            yield "annotated", path
    for path in _listed(folder / "labels"):
        yield "labels", path
    for path in _listed(folder / "downloads"):
        yield "downloads", path
    for inner in _listed(folder / "crops"):
        for path in _listed(inner):
            yield "crops", path


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read(path: Path) -> dict[str, Named]:
    """Return the names in a register; empty if it cannot be read or is invalid."""
    try:
        content = read_json(path, MAX_BYTES)
        return dict(_record(row) for row in content["sources"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _record(row: dict[str, Any]) -> tuple[str, Named]:
    """Return one source and its names; raises ValueError for a name that is not one path component."""
    source, base, film, addition = row["source"], row["name"], row["film"], row["crop_addition"]
    if not (isinstance(source, str) and isinstance(film, bool)):
        raise ValueError("not a row of a register")
    for part in (base, f"x{addition}"):
        if not isinstance(part, str) or part != os.path.basename(part) or not part or "\0" in part:
            raise ValueError("not a name of a file")
    if base in (".", ".."):
        raise ValueError("not a name of a file")
    return source, Named(base=base, film=film, addition=addition)
