"""Read YAML strictly as plain data: no objects, no aliases, no duplicate keys, limited size and depth."""

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
    """Return the mapping in the YAML file.

    Raises `unreadable` if the file does not exist or cannot be read, and UsageError with file and line for a file that
    is too large or malformed, for object tags, aliases, duplicate keys, or anything but a mapping with text keys.
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
    """Replace `path` with the mapping as YAML, with keys in order, after an optional comment."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    write_atomic(path, head + yaml.safe_dump(dict(mapping), sort_keys=False, allow_unicode=True))
