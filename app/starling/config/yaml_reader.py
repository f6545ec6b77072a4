"""Read YAML as plain data, strictly: no objects, no aliases, no duplicate keys, bounded size and depth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from starling.core.budget import BudgetExceeded
from starling.core.plain_yaml import NotYaml, load_yaml
from starling.core.regular_file import read_regular
from starling.core.words import printable, shown
from starling.errors import StarlingError, UsageError, readable
from starling.outputs.atomic import write_atomic

MAX_BYTES = 256 * 1024
"""Real descriptions stay below 40 KB; what is larger is not a configuration."""


def read_yaml(path: Path, unreadable: type[StarlingError] = UsageError) -> dict[str, Any]:
    """Return the mapping that the YAML file holds.

    Raises `unreadable` for a file that is not there or cannot be read, and UsageError naming file and line for an
    oversized or malformed one, object tags, aliases, duplicate keys, or anything but a mapping with text keys at the top.
    """
    try:
        with readable(unreadable):
            content = read_regular(path, MAX_BYTES)
    except OSError as error:
        raise unreadable(f"{printable(path)}: cannot be read: {error.strerror}; check the path") from None
    except BudgetExceeded:
        raise UsageError(
            f"{path}: larger than {MAX_BYTES // 1024} KiB, so not a configuration; check the path"
        ) from None
    try:
        value = load_yaml(content, path)
    except NotYaml as error:
        raise UsageError(f"{path}{error.place}: {error.problem}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: must hold `key: value` lines, found {type(value).__name__}")
    for key in value:
        if not isinstance(key, str):
            raise UsageError(f"{path}: the key {shown(repr(key))} must be text")
    return value


def write_yaml(path: Path, mapping: Mapping[str, Any], *, comment: str = "") -> None:
    """Replace `path` by the mapping as YAML, keys in their order, under an optional comment."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    write_atomic(path, head + yaml.safe_dump(dict(mapping), sort_keys=False, allow_unicode=True))
