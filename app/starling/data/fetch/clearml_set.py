"""Datasets of a ClearML server: fetched for `--data clearml://ID`, and made of a folder as a new version."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starling.config.yaml_reader import read_yaml
from starling.core.errors import DataError
from starling.core.files.atomic import write_atomic
from starling.core.files.refusals import refusal
from starling.core.files.safe_open import make_folder, open_folder, remove_tree, rename
from starling.core.paths import at_home, real_path
from starling.data.dataset.dataset import Dataset, DatasetDescription, read_class_names
from starling.data.fetch.acquire import CLEARML_SCHEME as SCHEME
from starling.data.fetch.acquire import write_description
from starling.data.fetch.download import only_one
from starling.errors import ServerError
from starling.tracking.clearml.client.api import UPLOAD_BYTES_PER_S, ClearmlApi, ClearmlRefusedError
from starling.tracking.clearml.client.credentials import REMEDY, find_credentials
from starling.tracking.clearml.client.sdk import CHUNK_BYTES, IDLE_S, bytes_below, run_sdk

FOLDER = ".cache/clearml"
"""Below the runs folder: fetched once for all containers of the host."""
_DONE = {"completed", "published", "closed"}
_PATIENCE_S = 10.0
_FETCHED_ID = ".clearml.json"
"""In a fetched folder: which dataset it is."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """A version of a dataset as the server has it now."""

    id: str
    project: str
    name: str
    version: str
    added: int
    modified: int
    removed: int

    @property
    def url(self) -> str:
        """What `--data` takes."""
        return f"{SCHEME}{self.id}"


def fetch_clearml_set(
    data: str,
    runs: Path,
    *,
    environment: Mapping[str, str] = os.environ,
    say: Say = print,
    show: Callable[[Callable[[], str]], None] = lambda line: None,
) -> Path:
    """Return the description of the dataset that `clearml://ID` names, fetched first unless it is there.

    The folder appears whole or not at all. Raises DataError saying what is wrong: no credentials, an unknown or
    unfinished dataset, a server that is away, no description at the root.
    """
    identity = data.removeprefix(SCHEME).strip("/")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", identity):
        raise DataError(
            f"--data {data}: not a dataset's id; copy it from the dataset's page: {SCHEME}0123abcd…"
        )
    root = (runs / FOLDER / identity).absolute()
    if not root.is_dir():
        with only_one(root, say):
            if not root.is_dir():  # no other process was faster
                _fetch(data, identity, root, environment, say, show)
    try:
        open_folder(root).close()  # a link in its place would be another's data
    except OSError as error:
        raise refusal(error, root) or DataError(f"--data {data}: {root}: {error.strerror}") from None
    return find_description(root, data)


def find_description(folder: Path, called: str) -> Path:
    """Return the one dataset YAML at the root of a folder; raises DataError where there is none, or several."""
    found = sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml") and path.is_file())
    described = [path for path in found if {"train", "val"} & read_yaml(path).keys()]
    if len(described) == 1:
        return described[0]
    if described:
        names = ", ".join(path.name for path in described)
        raise DataError(f"{called}: several dataset YAMLs at its root ({names}); keep the one to train on")
    names = f" (there are {', '.join(path.name for path in found)}, without train: and val:)" if found else ""
    raise DataError(
        f"{called}: no dataset YAML at its root{names}; put one beside the data, with train:, val: and names:, and make "
        "a new version of it: starling data version FOLDER"
    )


def make_version(
    folder: Path,
    *,
    project: str,
    name: str,
    version: str = "",
    parent: str = "",
    environment: Mapping[str, str] = os.environ,
    say: Say = print,
) -> Version:
    """Make a new version of a dataset of what `folder` holds: checked first, then created, synced, uploaded and closed.

    With `parent` only what changed since that dataset is uploaded. Raises DataError for data that cannot be trained
    on, or a server that does not take it.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the one that holds the dataset and its YAML")
    description = check_folder(folder, say)
    called = f"{folder}: no version was made"
    parent = parent.removeprefix(SCHEME)
    with _named(called):
        api = _api(called, environment)
        if parent:
            _check_is_done(api, parent, f"--parent {parent}")
        api.close()
        say(f"{description.path_yaml.name} is sound; uploading what is new to {api.credentials.files_host}")
        chunk = min(bytes_below(folder), CHUNK_BYTES)
        parents = [parent] if parent else []
        with tempfile.TemporaryDirectory(prefix="starling-version-") as scratch:
            answer = run_sdk(
                "create", str(folder), project, name, version, *parents,
                folder=Path(scratch), environment=environment, idle_s=IDLE_S + chunk / UPLOAD_BYTES_PER_S,
            )  # fmt: skip
    return Version(**answer)


def check_folder(folder: Path, say: Say) -> DatasetDescription:
    """Check what a version is to be made of: its description, and that the data it names is usable and inside."""
    path = find_description(folder, str(folder))
    if _leads_away(folder, read_yaml(path)):
        raise DataError(
            f"{path}: `path:` leads out of the folder, and would not be there on another machine; write `path: .`"
        )
    description = DatasetDescription.from_yaml(path)
    for split, places in description.splits.items():
        for place in places:
            if not real_path(place).is_relative_to(real_path(folder)):
                raise DataError(
                    f"{path}: {split}: {place} is outside {folder}, and would not be in the dataset"
                )
        found = Dataset.load(description, split)
        left_out = f", {found.skipped} unusable" if found.skipped else ""
        say(f"{split}: {len(found)} pictures{left_out}")
    return description


def _fetch(
    data: str,
    identity: str,
    root: Path,
    environment: Mapping[str, str],
    say: Say,
    show: Callable[[Callable[[], str]], None],
) -> None:
    scratch = root.with_name(f".{identity}.building")
    building = scratch / "set"
    remove_tree(scratch)  # left by a kill
    with _named(f"--data {data}"):
        api = _api(f"--data {data}", environment)
        task = _check_is_done(api, identity, f"--data {data}")
        api.close()
        say(f"fetching {data} ({task['name']}) from {api.credentials.files_host}")

        def progress(size: int) -> None:
            show(lambda: f"{data}: {size / 1e6:.0f} MB")

        try:
            make_folder(building)
            answer = run_sdk(
                "fetch", identity, str(building), folder=scratch, environment=environment, show=progress
            )
            path = find_description(building, f"--data {data}")
            mapping = read_yaml(path)
            if _leads_away(building, mapping):
                # What guides have: the place where the data lay on another machine.
                write_description(building, path, mapping, read_class_names(path))
            write_atomic(building / _FETCHED_ID, json.dumps(answer))
            rename(building, root)
        except OSError as error:
            raise refusal(error, root) or DataError(
                f"--data {data}: {error.filename or root}: {error.strerror or error}; choose another runs folder"
            ) from None
        finally:
            remove_tree(scratch)
    say(f"{root}: ready")


def _leads_away(folder: Path, mapping: Mapping[str, Any]) -> bool:
    """Return whether `path:` of a description in `folder` means something outside it."""
    given = mapping.get("path")
    if not isinstance(given, str):
        return False
    root = real_path(folder / at_home(given))
    return not (root.is_relative_to(real_path(folder)) and root.is_dir())


def _api(called: str, environment: Mapping[str, str]) -> ClearmlApi:
    credentials = find_credentials(environment)
    if credentials is None:
        raise DataError(f"{called}: ClearML is not configured: {REMEDY}")
    return ClearmlApi(credentials, patience_s=_PATIENCE_S)


def _check_is_done(api: ClearmlApi, identity: str, called: str) -> dict[str, Any]:
    """Return the task behind a dataset; raises DataError where there is none, or it is something else."""
    host = api.credentials.api_host
    try:
        task = dict(api.call("tasks.get_by_id", task=identity)["task"])
    except ClearmlRefusedError as error:
        if error.status == 401:
            raise
        raise DataError(
            f"{called}: {host} has no dataset of this id; copy it from the dataset's page, and check that the "
            "credentials are of its workspace"
        ) from None
    if "dataset" not in (task.get("system_tags") or []):
        raise DataError(
            f"{called}: is a task ({task.get('type')} {task.get('name')!r}), not a dataset; take a dataset's id"
        )
    if task.get("status") not in _DONE:
        raise DataError(
            f"{called}: the dataset is not finished (its state is {task.get('status')}); close it: clearml-data close --id {identity}"
        )
    return task


@contextmanager
def _named(called: str) -> Iterator[None]:
    """Turn what a server or the SDK says into a DataError that begins with what it is about."""
    try:
        yield
    except ServerError as error:
        raise DataError(f"{called}: {error}; nothing was left behind") from None
