"""Find the folders and lists that a dataset's YAML names, by the same rules for the trainer and the launcher."""

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
"""Environment variable with the folder that the user called the launcher in, if a replica's working folder differs."""


class BadDescription(Exception):
    """An invalid value in a description: its key, the value, and the problem in words."""

    def __init__(self, key: str | None, value: object, problem: str) -> None:
        super().__init__(problem)
        self.key, self.value, self.problem = key, value, problem


class Files(Protocol):
    """The files of the machine that the dataset is on."""

    def is_dir(self, path: Path) -> bool:
        """Return whether the path is a folder."""

    def exists(self, path: Path) -> bool:
        """Return whether the path exists."""

    def expand(self, base: Path, given: str) -> Path:
        """Return `given` below `base`, or `given` if it is absolute, with `~` replaced and links kept."""


class OwnFiles:
    """The files of this machine."""

    def is_dir(self, path: Path) -> bool:
        """Return whether the path is a folder."""
        return is_folder(path)

    def exists(self, path: Path) -> bool:
        """Return whether the path exists."""
        return exists(path)

    def expand(self, base: Path, given: str) -> Path:
        """Return `given` below `base`, or `given` if it is absolute, with `~` replaced and links kept."""
        return Path(os.path.normpath(base / at_home(given)))


OWN = OwnFiles()


def start_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder that the user called the command in: $STARLING_START in a replica, else the working folder."""
    return Path(environment.get(START) or Path.cwd())


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedPlaces:
    """The root and the entries of the splits, as written in the description at `yaml_path`."""

    yaml_path: Path
    root: str
    entries: Mapping[str, tuple[str, ...]]
    """Split name -> one or more entries; missing splits have no key."""

    @classmethod
    def of(cls, yaml_path: Path, description: Mapping[str, Any]) -> Self:
        """Return the root and the entries of a description; raises BadDescription."""
        entries = {split: _entries(split, description[split]) for split in SPLITS if description.get(split)}
        if not entries:
            raise BadDescription(None, None, "names no images; give `train:` and `val:`")
        root = description.get("path")
        if root is not None and (not isinstance(root, str) or "\0" in root):
            raise BadDescription("path", root, "must be a folder")
        return cls(yaml_path=yaml_path, root=root or ".", entries=entries)

    def roots(self, files: Files, start: Path | None) -> list[Path]:
        """Return the possible paths of the root, the likeliest first.

        A relative root is below the YAML's folder, below `start` or, as for the classic trainer, below the folder
        `datasets` beside `start`.
        """
        bases = [self.yaml_path.parent, *((start, start.parent / "datasets") if start else ())]
        spelled = dict.fromkeys((self.root, self.root.replace("\\", "/")))
        return list(dict.fromkeys(files.expand(base, name) for name in spelled for base in bases))

    def find_root(self, files: Files, start: Path | None) -> Path | None:
        """Return the first of the roots that holds the first split, else the first that exists, else None."""
        first = next(iter(self.entries.values()))[0]
        there = [root for root in self.roots(files, start) if files.is_dir(root)]
        return next((root for root in there if find_entry(root, first, files)), there[0] if there else None)


def find_entry(root: Path, entry: str, files: Files) -> Path | None:
    """Return the path of a split's entry, in the first of its spellings that exists; None if none exists."""
    places = (files.expand(root, spelling) for spelling in spellings(entry))
    return next((place for place in places if files.exists(place)), None)


def _entries(split: str, value: object) -> tuple[str, ...]:
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        if not isinstance(entry, str) or not entry or "\0" in entry:
            raise BadDescription(split, entry, "must be a folder, a .txt list, or a list of these")
    return tuple(entries)
