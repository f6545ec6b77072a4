"""Find the files and folders of the host that training arguments name, and check which of them a replica may see."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from launcher.hosts.files import LOCAL, HostFiles, is_the_systems
from starling.core import package
from starling.core.dataset import BadDescription, NamedPlaces, find_entry
from starling.core.errors import CheckpointError, DataError, StarlingError, UsageError, suggest
from starling.core.misplaced import misplaced
from starling.core.paths import at_home, tails
from starling.core.words import shown

MISSING: dict[str, type[StarlingError]] = {
    "data": DataError,
    "weights": CheckpointError,
    "hyp": UsageError,
    "cfg": UsageError,
    "space": UsageError,
    "hooks": UsageError,
}
"""The settings whose values are files, and the error for a missing file."""

_SHIPPED_FOLDER = {"cfg": "layouts", "data": "datasets", "hyp": "hyps", "space": "spaces"}
_PUBLISHED = re.compile(r"yolov5[nsmlx]6?(\.pt)?")
"""Bare names of weights that the trainer can fetch."""
_IMAGE_ROOT = PurePosixPath("/usr/src")
"""Paths below this folder belong to the image, and are not looked up on the host."""
_REMEDIES = {
    "data": "give the path of a dataset YAML",
    "weights": "give the path of a checkpoint, or --weights '' to train from scratch",
    "hooks": "give the path of a Python file",
}


@dataclass(frozen=True, slots=True)
class NamedFile:
    """A file that a setting names, and the paths that the file names."""

    path: Path
    shown: tuple[Path, ...] = ()
    """Further paths that replicas must see."""
    opened: tuple[Path, ...] = ()
    """Those further paths that the training opens."""
    start: Path | None = None
    """The folder in which a dataset's root was found, if the YAML alone does not determine it."""


@dataclass(frozen=True, slots=True)
class FileFinder:
    """Finds the host's files for a training called in `cwd`; `isolated` replicas see only mounted paths."""

    cwd: Path
    files: HostFiles
    isolated: bool

    def find(self, setting: str, given: str) -> NamedFile | None:
        """Return the host's file that a setting names; None for a file that the trainer ships or fetches.

        Raises the error of the setting if the file does not exist or the user may not access it.
        """
        try:
            path = self._existing(setting, given)
        except PermissionError as error:
            raise MISSING[setting](
                f"--{setting} {given}: you may not access {error.filename}; ask its owner, or give another path"
            ) from None
        if path is None:
            return None
        if setting == "data":
            dataset = read_dataset(path, self.files, self.cwd)
            return NamedFile(path, dataset.folders, dataset.splits, dataset.start)
        layouts = space_layouts(path, self.files) if setting == "space" else ()
        return NamedFile(path, layouts, layouts)

    def _existing(self, setting: str, given: str) -> Path | None:
        if "://" in given:
            return None
        path = self.files.expand(self.cwd, given)
        if self.files.is_file(path):
            self._refuse_misplaced(setting, given, path)
            return path
        if setting == "weights" and self.files.is_file(path.with_name(f"{path.name}.pt")):
            return path.with_name(f"{path.name}.pt")  # `yolov5s` means `yolov5s.pt`
        if setting == "weights" and _PUBLISHED.fullmatch(given):
            return self._kept_weights(given)
        known = _shipped(setting)
        name = PurePosixPath(given).name
        own = path.is_absolute() and given.startswith(("~", "/home"))
        if {name, f"{name}.yaml"} & set(known) and not own:
            return None
        if self.isolated and PurePosixPath(given).is_relative_to(_IMAGE_ROOT):
            return None
        self._refuse_misplaced(setting, given, path)
        remedy = _REMEDIES.get(setting, f"give a path, or one of: {', '.join(sorted(known))}")
        where = f" on the remote machine ({path})" if self.files.remote else ""
        raise MISSING[setting](f"--{setting} {given}: no such file{where}{suggest(name, known)}; {remedy}")

    def _refuse_misplaced(self, setting: str, given: str, path: Path) -> None:
        """Raise the error of the setting if the path holds another kind of file; checks files of this machine only."""
        if setting != "hooks" and not self.files.remote and (wrong := misplaced(f"--{setting}", path)):
            raise MISSING[setting](f"--{setting} {given}: {wrong}")

    def _kept_weights(self, given: str) -> Path:
        """Return published weights from the trainer's folder of weights on the host; replicas have no such folder."""
        name = given if given.endswith(".pt") else f"{given}.pt"
        folder = self.files.home / ".cache" / "starling" / "weights"
        if not self.files.remote:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or self.files.home / ".cache")
            folder = Path(os.environ.get("STARLING_WEIGHTS") or cache / "starling" / "weights")
            folder = at_home(folder).absolute()
        if self.files.is_file(folder / name):
            return folder / name
        raise CheckpointError(
            f"--weights {given}: neither here nor in {folder}; fetch it once for all replicas: "
            f"starling data download {name}"
        )


def _shipped(setting: str) -> list[str]:
    """Return the names of the YAML files that the trainer ships for this setting."""
    if setting not in _SHIPPED_FOLDER:
        return []
    return [path.name for path in _shipped_folder(setting).glob("*.yaml")]


def _shipped_folder(setting: str) -> Path:
    return package.PARENT / "starling" / "config" / _SHIPPED_FOLDER[setting]


def start_of_shipped_dataset(given: str, start: Path) -> Path | None:
    """Return `start` if the images of the shipped dataset of this name are found from `start` only.

    None if the images are found without `start`, or if no dataset of this name is shipped.
    """
    name = PurePosixPath(given).name
    path = _shipped_folder("data") / (name if name in _shipped("data") else f"{name}.yaml")
    if "://" in given or not path.is_file():
        return None
    named = _read(path, LOCAL)
    root = named.find_root(LOCAL, start)
    return _start_needed(named, root, LOCAL, start) if root else None


@dataclass(frozen=True, slots=True)
class DatasetPaths:
    """The paths of a dataset's images: its root, and the folder or list of each split."""

    root: Path
    splits: tuple[Path, ...]
    start: Path | None = None
    """The folder in which the root was found, if the YAML alone does not determine it; replicas then need it too."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders that hold the dataset: the root, and the splits outside the root."""
        return (self.root, *(path for path in self.splits if not path.is_relative_to(self.root)))


def read_dataset(yaml_path: Path, files: HostFiles = LOCAL, start: Path | None = None) -> DatasetPaths:
    """Return the paths that a dataset's YAML names, as the trainer finds them if it is called in `start`.

    Raises DataError if the YAML cannot be read or is invalid, if the root or a split does not exist, or if replicas
    must not see a folder.
    """
    named = _read(yaml_path, files)
    root = named.find_root(files, start)
    if root is None:
        tried = ", ".join(map(str, named.roots(files, start)))
        raise DataError(
            f"{yaml_path}: its root (path: {named.root}) is not a folder (tried {tried}); put it there, or correct `path`"
        )
    _allowed(root, yaml_path, files)
    splits: list[Path] = []
    for split, entries in named.entries.items():
        for entry in entries:
            path = _find_split(root, entry, yaml_path, split, files)
            if path is not None:
                splits.append(path if path.is_relative_to(root) else _allowed(path, yaml_path, files))
    return DatasetPaths(root, tuple(splits), start=_start_needed(named, root, files, start))


def _start_needed(named: NamedPlaces, root: Path, files: HostFiles, start: Path | None) -> Path | None:
    return None if root in named.roots(files, None) else start


def _find_split(root: Path, entry: str, yaml_path: Path, split: str, files: HostFiles) -> Path | None:
    """Return the path of a split's folder or list; None for a missing test split, which training does not need."""
    found = find_entry(root, entry, files)
    if found is not None or split == "test":
        return found
    below = (files.expand(root, tail) for tail in tails(entry))
    likely = next(filter(files.exists, below), None)
    hint = f" ({likely} is there)" if likely else ""
    path = files.expand(root, entry)
    raise DataError(f"{yaml_path}: {split}: {path} does not exist; correct `{split}` or `path`{hint}")


def _read(path: Path, files: HostFiles) -> NamedPlaces:
    from starling.core.plain_yaml import MOST_BYTES, NotYaml, OtherYaml, load_mapping

    try:
        return NamedPlaces.of(path, load_mapping(files.read(path, MOST_BYTES + 1), path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except OtherYaml as error:
        raise DataError(f"{path}: {error.problem}; give the dataset's YAML") from None
    except NotYaml as error:
        raise DataError(f"{path}{error.place}: not valid YAML: {error.problem}; correct the file") from None
    except BadDescription as error:
        value = "" if error.key is None else f" {error.key}={shown(repr(error.value))}:"
        raise DataError(f"{path}:{value} {error.problem}") from None


def _allowed(folder: Path, yaml_path: Path, files: HostFiles) -> Path:
    """Return `folder`; raises DataError if its mount would show replicas more than a dataset (links are followed)."""
    real = files.real(folder)
    if is_the_systems((folder, real), files.home):
        raise DataError(
            f"{yaml_path}: its root {real} would show replicas more than a dataset; "
            "move the dataset to a folder of its own and name that in `path`"
        )
    return folder


def space_layouts(yaml_path: Path, files: HostFiles = LOCAL) -> tuple[Path, ...]:
    """Return the layouts that a search space names below `cfg`; relative paths start at the YAML's folder.

    The trainer reports errors in the space: a file that cannot be read counts as naming no layouts.
    """
    from starling.core.plain_yaml import MOST_BYTES, NotYaml, load_mapping

    try:
        space = load_mapping(files.read(yaml_path, MOST_BYTES + 1))
    except (OSError, NotYaml):
        return ()
    names = space.get("cfg")
    found = (
        files.real(files.expand(yaml_path.parent, name))
        for name in (names if isinstance(names, list) else ())
        if isinstance(name, str) and name.endswith((".yaml", ".yml"))
    )
    return tuple(path for path in found if files.is_file(path))
