"""What a study is about: what all its workers must agree on, and how two of them differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starling.core.errors import UsageError
from starling.search.plan import StudyPlan
from starling.search.space_file import Space

VERSION = 2
"""Of the records of a study; one of another version is refused."""
_DIFFERENCES_SHOWN = 8


def define(
    *, seed: int, hyp: Mapping[str, float], plan: StudyPlan, space: Space, signature: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a study's definition as it comes back from where it is stored: JSON values only."""
    definition = {
        "version": VERSION,
        "seed": seed,
        "hyp": dict(hyp),
        "plan": plan.as_dict(),
        "space": space.as_dict(),
        "signature": dict(signature),
    }
    return json.loads(json.dumps(definition, default=str))  # type: ignore[no-any-return]


def check_version(directory: Path, definition: Mapping[str, Any]) -> None:
    """Raise UsageError for a study whose records are of another version than these."""
    version = definition.get("version")
    if version != VERSION:
        raise UsageError(
            f"{directory}: holds a study of version {version}, and this program works on version {VERSION}; finish it "
            "with the program that began it, or start a search under another --name and import its evolve.csv"
        )


def describe_difference(directory: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return what a joiner would have searched otherwise than the study does."""
    old, new = _flatten(there), _flatten(here)
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    lines = [
        f"  {key}: {old.get(key)!r} in the study, {new.get(key)!r} here" for key in keys[:_DIFFERENCES_SHOWN]
    ]
    if len(keys) > _DIFFERENCES_SHOWN:
        lines.append(f"  and {len(keys) - _DIFFERENCES_SHOWN} more")
    return (
        f"{directory}: is a search for something else, and its results cannot be compared with these:\n"
        + "\n".join(lines)
        + "\nGive the same settings to join it, or another --name to start a new one."
    )


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
