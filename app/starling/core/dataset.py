"""Which folders and lists a dataset's YAML names: one rule for the trainer that reads them, and the launcher that shows them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from starling.core.files.regular import exists, is_folder
from starling.core.paths import at_home, spellings

SPLITS = ("train", "val", "test")
START = "STARLING_START"
"""Environment variable: the folder that a replica was asked for in, where its own working folder is another one."""


class BadDescription(Exception):
    """A value of a description that cannot work: its key, the value, and the problem in words."""

    def __init__(self, key: str | None, value: object, problem: str) -> None:
        super().__init__(problem)
        self.key, self.value, self.problem = key, value, problem


class Files(Protocol):
    """The files of the machine that the dataset is on."""

    def is_dir(self, path: Path) -> bool:
        """Return whether a folder is there."""

    def exists(self, path: Path) -> bool:
        """Return whether anything is there."""

    def expand(self, base: Path, given: str) -> Path:
        """Return `given` below `base`, or by itself where it is absolute, its `~` replaced and its links kept."""


class OwnFiles:
    """The files of this machine."""

    def is_dir(self, path: Path) -> bool:
        """Return whether a folder is there."""
        return is_folder(path)

    def exists(self, path: Path) -> bool:
        """Return whether anything is there."""
        return exists(path)

    def expand(self, base: Path, given: str) -> Path:
        """Return `given` below `base`, or by itself where it is absolute, its `~` replaced and its links kept."""
        return Path(os.path.normpath(base / at_home(given)))


OWN = OwnFiles()


def start_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return where the command was given: a replica's launcher names it, else it is the working folder."""
    return Path(environment.get(START) or Path.cwd())


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedPlaces:
    """The root and the entries of the splits, as a description at `yaml_path` writes them."""

    yaml_path: Path
    root: str
    entries: Mapping[str, tuple[str, ...]]
    """Split name -> one entry or more; no split that the description leaves out."""

    @classmethod
    def of(cls, yaml_path: Path, description: Mapping[str, Any]) -> Self:
        """Return what a description says; raises BadDescription."""
        entries = {split: _entries(split, description[split]) for split in SPLITS if description.get(split)}
        if not entries:
            raise BadDescription(None, None, "names no images; give `train:` and `val:`")
        root = description.get("path")
        if root is not None and (not isinstance(root, str) or "\0" in root):
            raise BadDescription("path", root, "must be a folder")
        return cls(yaml_path=yaml_path, root=root or ".", entries=entries)

    def roots(self, files: Files, start: Path | None) -> list[Path]:
        """Return where the root may be, the likeliest first.

        A relative one is looked for in the YAML's folder, in `start` and, as the classic trainer keeps them, in the folder
        `datasets` beside `start`.
        """
        bases = [self.yaml_path.parent, *((start, start.parent / "datasets") if start else ())]
        spelled = dict.fromkeys((self.root, self.root.replace("\\", "/")))
        return list(dict.fromkeys(files.expand(base, name) for name in spelled for base in bases))

    def find_root(self, files: Files, start: Path | None) -> Path | None:
        """Return the first of the roots that holds the first split, else the first that is there, else None."""
        first = next(iter(self.entries.values()))[0]
        there = [root for root in self.roots(files, start) if files.is_dir(root)]
        return next((root for root in there if find_entry(root, first, files)), there[0] if there else None)


def find_entry(root: Path, entry: str, files: Files) -> Path | None:
    """Return the path that an entry of a split means, in the first of its spellings that is there."""
    places = (files.expand(root, spelling) for spelling in spellings(entry))
    return next((place for place in places if files.exists(place)), None)


def _entries(split: str, value: object) -> tuple[str, ...]:
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        if not isinstance(entry, str) or not entry or "\0" in entry:
            raise BadDescription(split, entry, "must be a folder, a .txt list, or a list of these")
    return tuple(entries)
