"""Which folders of the host a dataset's YAML names, and which of them a replica may see."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import DataError
from launcher.hosts.host_files import LOCAL, HostFiles, expand
from launcher.hosts.host_paths import is_the_systems
from starling.core.paths import spellings, tails

MOST_BYTES = 1024**2
"""No description of a dataset comes near; a larger file is something else."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Where a dataset's pictures are: its root, and the folder or list of each split."""

    root: Path
    splits: tuple[Path, ...]

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders that hold all of it: the root, and splits that lie outside the root."""
        return (self.root, *(place for place in self.splits if not place.is_relative_to(self.root)))


def read_dataset(yaml_path: Path, files: HostFiles = LOCAL) -> Dataset:
    """Return the places that a dataset's YAML names.

    The root is the YAML's `path`, relative to the YAML, or the YAML's own folder. Raises DataError for a file
    that cannot be read, a root or a split that is not there, or a folder that no replica may see.
    """
    description = _read(yaml_path, files)
    named = description.get("path") or "."
    if not isinstance(named, str):
        raise DataError(f"{yaml_path}: path={named!r} is not a folder's name")
    roots = [expand(files, yaml_path.parent, name) for name in (named, named.replace("\\", "/"))]
    root = next((one for one in roots if files.is_dir(one)), roots[0])
    if not files.is_dir(root):
        raise DataError(f"{yaml_path}: its root {root} (path: {named}) is not a folder; correct `path`")
    _allowed(root, yaml_path, files)
    splits: list[Path] = []
    for split in ("train", "val", "test"):
        for entry in _entries(description.get(split)):
            place = _find_split(root, entry, yaml_path, split, files)
            if place is not None:
                splits.append(place if place.is_relative_to(root) else _allowed(place, yaml_path, files))
    return Dataset(root, tuple(splits))


def _find_split(root: Path, entry: str, yaml_path: Path, split: str, files: HostFiles) -> Path | None:
    """Return where a split's folder or list is; None for an absent test split, which training does without."""
    place = expand(files, root, entry)
    for candidate in (expand(files, root, spelling) for spelling in spellings(entry)):
        if files.is_dir(candidate) or files.is_file(candidate):
            return candidate
    if split == "test":
        return None
    below = [expand(files, root, tail) for tail in tails(entry)]
    likely = next((one for one in below if files.is_dir(one) or files.is_file(one)), None)
    hint = f" ({likely} is there)" if likely else ""
    raise DataError(f"{yaml_path}: {split}: {place} does not exist; correct `{split}` or `path`{hint}")


def _entries(value: Any) -> list[str]:
    return [
        item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str) and item
    ]


def _read(path: Path, files: HostFiles) -> dict[str, Any]:
    from starling.core.plain_yaml import NotYaml, load_yaml

    try:
        raw = files.read(path, MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise DataError(f"{path}: over 1 MB, so no dataset description; give the dataset's YAML")
        description = load_yaml(raw, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except NotYaml as error:
        raise DataError(f"{path}{error.place}: not valid YAML: {error.problem}; correct the file") from None
    if not isinstance(description, dict):
        raise DataError(f"{path}: holds no `train:` and `val:`; give the dataset's YAML")
    return description


def _allowed(folder: Path, yaml_path: Path, files: HostFiles) -> Path:
    """Return `folder` unless mounting it would show a replica more than a dataset (links are followed)."""
    real = files.real(folder)
    if is_the_systems((folder, real), files.home):
        raise DataError(
            f"{yaml_path}: its root {real} would show replicas more than a dataset; "
            "move the dataset to a folder of its own and name that in `path`"
        )
    return folder
