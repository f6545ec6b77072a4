"""Find the dataset that `--data` names: a file, a shipped description, or a dataset on a ClearML server."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starling.config.shipped import find_config
from starling.config.yaml_reader import read_yaml
from starling.core.errors import DataError
from starling.core.files.atomic import write_atomic
from starling.core.files.refusals import refusal
from starling.core.files.safe_open import make_folder, open_folder, remove_tree, rename, runs_root
from starling.core.paths import at_home, real_path
from starling.data.dataset.dataset import Dataset, DatasetDescription, read_class_names
from starling.data.fetch.acquire import write_description
from starling.data.fetch.download import Show, only_one
from starling.tracking.clearml import DATASET_SCHEME

logger = logging.getLogger(__name__)

CLEARML_FOLDER = ".cache/clearml"
"""Folder below the runs folder for ClearML datasets: each is fetched once for all containers of the host."""
_FETCHED_ID = ".clearml.json"
"""File in a fetched folder with the identity of the dataset."""


def find_dataset(
    data: str,
    show: Show = lambda line: None,
    environment: Mapping[str, str] = os.environ,
) -> Path:
    """Return the description that `--data` names; a ClearML dataset is fetched first unless it exists here.

    The folder of a fetched dataset appears only when it is complete. Raises DataError with the problem: no such file,
    no credentials, an unknown or unfinished dataset, an unreachable server, no description at the root.
    """
    if not data.startswith(DATASET_SCHEME):
        return find_config("datasets", data)
    identity = data.removeprefix(DATASET_SCHEME).strip("/")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", identity):
        raise DataError(
            f"--data {data}: not a dataset's id; copy it from the dataset's page: {DATASET_SCHEME}0123abcd…"
        )
    root = (runs_root() / CLEARML_FOLDER / identity).absolute()
    if not root.is_dir():
        with only_one(root):
            if not root.is_dir():  # no other process was faster
                _fetch_clearml(identity, root, environment, show)
    try:
        open_folder(root).close()  # a link in place of the folder would lead to another user's data
    except OSError as error:
        raise refusal(error, root) or DataError(f"--data {data}: {root}: {error.strerror}") from None
    return find_description(root, data)


def _fetch_clearml(identity: str, root: Path, environment: Mapping[str, str], show: Show) -> None:
    """Fetch a dataset of the ClearML server, check its description, and put the folder at `root`."""
    from starling.tracking.clearml.dataset import DatasetServer  # only ClearML datasets need this import

    called = f"--data {DATASET_SCHEME}{identity}"
    scratch = root.with_name(f".{identity}.building")
    building = scratch / "set"
    remove_tree(scratch)  # remains of a killed process
    try:
        make_folder(building)
        answer = DatasetServer(called, environment).download(identity, building, scratch, show)
        path = find_description(building, called)
        mapping = read_yaml(path)
        if _leads_away(building, mapping):
            # Many descriptions name the folder of the data on another machine.
            write_description(building, path, mapping, read_class_names(path))
        write_atomic(building / _FETCHED_ID, json.dumps(answer))
        rename(building, root)
    except OSError as error:
        raise refusal(error, root) or DataError(
            f"{called}: {error.filename or root}: {error.strerror or error}; choose another runs folder"
        ) from None
    finally:
        remove_tree(scratch)
    logger.info(f"{root}: ready")


def find_description(folder: Path, called: str) -> Path:
    """Return the only dataset YAML at the root of a folder; raises DataError if there is none, or several."""
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


def check_folder(folder: Path) -> DatasetDescription:
    """Check that `folder` holds a description, and that the data it names is usable and inside the folder."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the one that holds the dataset and its YAML")
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
        logger.info(f"{split}: {len(found)} images{left_out}")
    return description


def _leads_away(folder: Path, mapping: Mapping[str, Any]) -> bool:
    """Return whether `path:` of a description in `folder` names a place outside the folder."""
    given = mapping.get("path")
    if not isinstance(given, str):
        return False
    root = real_path(folder / at_home(given))
    return not (root.is_relative_to(real_path(folder)) and root.is_dir())
