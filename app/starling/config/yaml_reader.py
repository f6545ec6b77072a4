"""Read YAML as plain data, strictly: no objects, no aliases, no duplicate keys, bounded size and depth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from starling.core.budget import BudgetExceeded
from starling.core.errors import StarlingError, UsageError
from starling.core.files.atomic import write_atomic
from starling.core.files.refusals import readable
from starling.core.files.regular import read_regular
from starling.core.plain_yaml import MOST_BYTES, NotYaml, load_mapping
from starling.core.words import printable


def read_yaml(path: Path, unreadable: type[StarlingError] = UsageError) -> dict[str, Any]:
    """Return the mapping that the YAML file holds.

    Raises `unreadable` for a file that is not there or cannot be read, and UsageError naming file and line for an
    oversized or malformed one, object tags, aliases, duplicate keys, or anything but a mapping with text keys at the top.
    """
    try:
        with readable(unreadable):
            content = read_regular(path, MOST_BYTES)
    except OSError as error:
        raise unreadable(f"{printable(path)}: cannot be read: {error.strerror}; check the path") from None
    except BudgetExceeded:
        raise UsageError(
            f"{path}: larger than {MOST_BYTES // 1024} KiB, so not a configuration; check the path"
        ) from None
    try:
        return load_mapping(content, path)
    except NotYaml as error:
        raise UsageError(f"{path}{error.place}: {error.problem}") from None


def write_yaml(path: Path, mapping: Mapping[str, Any], *, comment: str = "") -> None:
    """Replace `path` by the mapping as YAML, keys in their order, under an optional comment."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    write_atomic(path, head + yaml.safe_dump(dict(mapping), sort_keys=False, allow_unicode=True))
