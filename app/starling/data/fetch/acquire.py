"""Get a public dataset by its description: fetch, unpack and convert it by the `download:` steps.

Steps are data, never code: `{url, sha256, extract_to, strip}` fetches and unpacks an archive, `{url, sha256, save_to}`
fetches a file without unpacking it, `{names: FILE}` takes the class names from a fetched file, `{convert: NAME, …}`
calls a converter of `starling.data.fetch.convert` by its name.
"""

from __future__ import annotations

import inspect
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from starling.config.class_names import names_by_number
from starling.config.shipped import DATASETS_FOLDER
from starling.config.yaml_reader import read_yaml, write_yaml
from starling.core.errors import ConfigError, DataError, suggest
from starling.core.files.refusals import refusal
from starling.core.paths import at_home, real_path
from starling.data.fetch.archive import unpack
from starling.data.fetch.convert import Converted, read_open_images_classes
from starling.data.fetch.converters import CONVERTERS
from starling.data.fetch.download import Download, FetchError, Show, check_url, fetch, mirrored, only_one

logger = logging.getLogger(__name__)

MAX_BYTES = 64 << 30
"""Maximum size of an archive; the largest archive of the shipped descriptions has about 50 GB."""
_FETCH_KEYS = ("url", "sha256", "extract_to", "strip", "save_to")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetch:
    """An archive to fetch and unpack."""

    url: str
    sha256: str | None
    extract_to: PurePosixPath
    """Target folder, relative to the dataset's folder."""
    strip: str
    """Leading folder that is removed from the paths of the archive's entries."""
    save_to: PurePosixPath | None
    """Target folder, relative to the dataset's folder, of a file that is not unpacked; None for an archive."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Convert:
    """A converter to run on the dataset's folder."""

    name: str
    arguments: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """Class names to take from a file in the dataset's folder: class descriptions in the format of Open Images."""

    source: PurePosixPath
    count: int | None
    """Expected number of class names, the description's `nc:`."""


Step = Fetch | Convert | Names


def read_steps(path: Path) -> list[Step]:
    """Return the `download:` steps of a description; an empty list if it has no steps.

    Raises ConfigError if `download:` is no list of steps; a script, as in other trainers' descriptions, is never run.
    """
    mapping = read_yaml(path)
    value = mapping.get("download")
    if value is None:
        return []
    if not isinstance(value, list):
        raise ConfigError(
            f"{path}: download",
            str(value)[:60],
            "must be a list of steps (docs/data.md); a script is never run",
        )
    nc = mapping.get("nc")
    return [_step(f"{path}: download[{number}]", item, nc) for number, item in enumerate(value)]


def acquire(
    path: Path,
    *,
    into: Path = DATASETS_FOLDER,
    show: Show = lambda line: None,
) -> Path:
    """Put the dataset of the description at `path` below `into`, unless it exists there; return the dataset's folder.

    The folder appears only when it is complete. It holds a copy of the description with `path: .`, which stays valid if
    the folder is moved or mounted. Raises DataError if fetching fails, UsageError for a wrong description.
    """
    steps, mapping = read_steps(path), read_yaml(path)
    root = real_path(at_home(into)) / dataset_name(path, mapping)
    if root.is_dir():
        logger.info(f"{root}: is there already; nothing is fetched")
        return root
    if not any(isinstance(step, Fetch) for step in steps):
        raise DataError(
            f"{path}: says no place to fetch it from; get the data yourself, and put it at {root}"
        )
    archives, building = root.parent / ".downloads" / root.name, root.with_name(f".{root.name}.building")
    try:
        with only_one(root):
            if root.is_dir():  # another process was faster
                return root
            shutil.rmtree(building, ignore_errors=True)
            try:
                building.mkdir()
                given = class_names(path, mapping, steps)
                names = run_steps(steps, building, given, archives=archives, show=show)
                write_description(building, path, mapping, names)
                building.rename(root)
            finally:
                shutil.rmtree(building, ignore_errors=True)  # removes an unfinished folder; the archives stay
    except FetchError as error:
        raise DataError(
            f"{path.name}: cannot be fetched: {error}; or put the dataset at {root} yourself"
        ) from None
    except OSError as error:
        raise refusal(error, root) or DataError(
            f"{error.filename or root}: {error.strerror or error}; choose another folder"
        ) from None
    shutil.rmtree(archives, ignore_errors=True)
    with suppress(OSError):  # the folder holds archives of another dataset
        archives.parent.rmdir()
    logger.info(f"{root}: ready; its own description is {root / path.name}")
    return root


def write_description(folder: Path, path: Path, mapping: Mapping[str, Any], names: Sequence[str]) -> None:
    """Write a copy of the description at `path`, with the class names `names`, into the folder of the data."""
    description = {key: value for key, value in mapping.items() if key != "download"}
    write_yaml(
        folder / path.name,
        {**description, "path": ".", "names": description.get("names") or list(names)},
        comment=f"Written beside its data, from {path.name}",
    )


def run_steps(
    steps: Sequence[Step],
    root: Path,
    names: Sequence[str],
    *,
    archives: Path,
    show: Show = lambda line: None,
) -> tuple[str, ...]:
    """Run the steps in order in the dataset's folder `root`; downloads are kept in `archives`.

    Returns the class names: `names`, or the names that a step has taken from a file.
    """
    for step in steps:
        if isinstance(step, Names):
            names = _read_names(root / step.source, step.count)
            logger.info(f"{step.source}: {len(names)} class names")
            continue
        if isinstance(step, Convert):
            logger.info(f"converting: {step.name} {' '.join(step.arguments.values())}")
            done = CONVERTERS[step.name](root, names, **step.arguments)
            images, remark = done if isinstance(done, Converted) else (done, "")
            logger.info(f"converted: {images} images{f'; left out: {remark}' if remark else ''}")
            continue
        url = mirrored(step.url)
        archive = archives / PurePosixPath(url).name
        if not archive.is_file():
            logger.info(f"fetching {url}")
            wanted = Download(url=url, target=archive, max_bytes=MAX_BYTES, sha256=step.sha256)
            logger.info(f"{archive.name}: SHA-256 {fetch(wanted, show=show)}")
        if step.save_to is not None:
            _keep(archive, root / step.save_to)
            continue
        count = unpack(
            archive,
            root / step.extract_to,
            strip=step.strip,
            show=lambda n, archive=archive: show(lambda: f"{archive.name}: {n} files unpacked"),  # type: ignore[misc]
        )
        logger.info(f"{archive.name}: {count} files unpacked")
    return tuple(names)


def _read_names(path: Path, count: int | None) -> tuple[str, ...]:
    names = tuple(read_open_images_classes(path).values())
    if count is not None and len(names) != count:
        raise DataError(f"{path}: {len(names)} classes, the description's `nc:` is {count}; make them agree")
    return names


def _keep(file: Path, folder: Path) -> None:
    """Link a fetched file into `folder`, or copy it if the file system has no hard links."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / file.name
    if target.exists():
        raise DataError(f"{target}: would be written twice; refused")
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def dataset_name(path: Path, mapping: Mapping[str, Any]) -> str:
    """Return the folder name of a dataset: the last part of its `path:`, or else the name of the description."""
    given = mapping.get("path")
    name = PurePosixPath(given).name if isinstance(given, str) else ""
    return name if name not in ("", ".", "..") else path.stem


def class_names(path: Path, mapping: Mapping[str, Any], steps: Sequence[Step]) -> tuple[str, ...]:
    """Return the description's class names in order, for converters that look up classes by name.

    An empty tuple if a step takes the names from a file.
    """
    names = mapping.get("names")
    if any(isinstance(step, Names) for step in steps):
        if names is not None:
            raise ConfigError(f"{path}: names", "a list and a step", "must be one of them; remove the other")
        return ()
    if isinstance(names, dict):
        names = names_by_number(names)
    if not isinstance(names, list):
        raise ConfigError(f"{path}: names", names, "give the class names; the labels are converted by them")
    return tuple(str(name) for name in names)


def _step(where: str, item: object, nc: int | None) -> Step:
    if not isinstance(item, dict) or not all(isinstance(value, str) for value in item.values()):
        raise ConfigError(where, item, "must be `url:`, `names:` or `convert:` with text values")
    if "names" in item:
        return _names_step(where, item, nc)
    return convert_step(where, item) if "convert" in item else _fetch_step(where, item)


def _names_step(where: str, item: Mapping[str, str], nc: int | None) -> Names:
    if len(item) != 1:
        raise ConfigError(where, sorted(item), "a `names:` step has nothing but the file of class names")
    return Names(source=_inside(f"{where}.names", item["names"]), count=nc)


def convert_step(where: str, item: Mapping[str, str]) -> Convert:
    """Return the converter of a step with its arguments; raises ConfigError with a message that begins with `where`."""
    name = item["convert"]
    if name not in CONVERTERS:
        raise ConfigError(
            f"{where}.convert", name, f"must be one of {', '.join(CONVERTERS)}{suggest(name, CONVERTERS)}"
        )
    arguments = {key: value for key, value in item.items() if key != "convert"}
    parameters = inspect.signature(CONVERTERS[name]).parameters.values()
    wanted = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    if arguments.keys() != wanted:
        raise ConfigError(where, sorted(arguments), f"`convert: {name}` takes {', '.join(sorted(wanted))}")
    for key, value in arguments.items():
        _inside(f"{where}.{key}", value)
    return Convert(name=name, arguments=arguments)


def _fetch_step(where: str, item: Mapping[str, str]) -> Fetch:
    for key in item:
        if key not in _FETCH_KEYS:
            raise ConfigError(
                where, key, f"unknown{suggest(key, _FETCH_KEYS)}; known: {', '.join(_FETCH_KEYS)}"
            )
    if "url" not in item:
        raise ConfigError(where, sorted(item), "must have `url:`, `names:` or `convert:`")
    if "save_to" in item and ("extract_to" in item or "strip" in item):
        raise ConfigError(where, sorted(item), "`save_to:` keeps the file as it is; leave the others out")
    if PurePosixPath(check_url(item["url"])).name in ("", ".", "..") or "?" in item["url"]:
        raise ConfigError(f"{where}.url", item["url"], "must end in the archive's name")
    return Fetch(
        url=item["url"],
        sha256=item.get("sha256"),
        extract_to=_inside(f"{where}.extract_to", item.get("extract_to", ".")),
        strip=item.get("strip", ""),
        save_to=_inside(f"{where}.save_to", item["save_to"]) if "save_to" in item else None,
    )


def _inside(where: str, value: str) -> PurePosixPath:
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or "\0" in value:
        raise ConfigError(where, value, "must be a folder inside the dataset's own")
    return path
