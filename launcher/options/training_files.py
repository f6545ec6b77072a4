"""Which folders of the host a dataset's YAML names, and which of them a replica may see."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launcher.hosts.files import LOCAL, HostFiles, is_the_systems
from starling.core.dataset import BadDescription, NamedPlaces, find_entry
from starling.core.errors import DataError
from starling.core.paths import tails
from starling.core.words import shown


@dataclass(frozen=True, slots=True)
class Dataset:
    """Where a dataset's pictures are: its root, and the folder or list of each split."""

    root: Path
    splits: tuple[Path, ...]
    start: Path | None = None
    """Where the root was looked for, if it was not found from the YAML: a replica has to be told."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders that hold all of it: the root, and splits that lie outside the root."""
        return (self.root, *(place for place in self.splits if not place.is_relative_to(self.root)))


def read_dataset(yaml_path: Path, files: HostFiles = LOCAL, start: Path | None = None) -> Dataset:
    """Return the places that a dataset's YAML names, as the trainer finds them when it is called in `start`.

    Raises DataError for a file that cannot be read or that no trainer takes, a root or a split that is not there, or a
    folder that no replica may see.
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
            place = _find_split(root, entry, yaml_path, split, files)
            if place is not None:
                splits.append(place if place.is_relative_to(root) else _allowed(place, yaml_path, files))
    return Dataset(root, tuple(splits), start=_start_needed(named, root, files, start))


def start_of_shipped(yaml_path: Path, start: Path) -> Path | None:
    """Return `start` where a description that the trainer carries has its data there; None where it may be anywhere."""
    named = _read(yaml_path, LOCAL)
    root = named.find_root(LOCAL, start)
    return _start_needed(named, root, LOCAL, start) if root else None


def _start_needed(named: NamedPlaces, root: Path, files: HostFiles, start: Path | None) -> Path | None:
    return None if root in named.roots(files, None) else start


def _find_split(root: Path, entry: str, yaml_path: Path, split: str, files: HostFiles) -> Path | None:
    """Return where a split's folder or list is; None for an absent test split, which training does without."""
    found = find_entry(root, entry, files)
    if found is not None or split == "test":
        return found
    below = (files.expand(root, tail) for tail in tails(entry))
    likely = next(filter(files.exists, below), None)
    hint = f" ({likely} is there)" if likely else ""
    place = files.expand(root, entry)
    raise DataError(f"{yaml_path}: {split}: {place} does not exist; correct `{split}` or `path`{hint}")


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
    """Return `folder` unless mounting it would show a replica more than a dataset (links are followed)."""
    real = files.real(folder)
    if is_the_systems((folder, real), files.home):
        raise DataError(
            f"{yaml_path}: its root {real} would show replicas more than a dataset; "
            "move the dataset to a folder of its own and name that in `path`"
        )
    return folder
