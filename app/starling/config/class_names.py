"""Read class names that a description maps from numbers."""

from __future__ import annotations

from collections.abc import Mapping


def names_by_number(names: Mapping[object, object]) -> list[object] | None:
    """Return the names of `0: a, 1: b` in order of the numbers; None unless the keys are 0, 1, 2, … without gaps.

    The keys may be quoted, as some exporters write them.
    """
    numbered = {
        int(key)
        if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 10
        else key: name
        for key, name in names.items()
    }
    if any(type(key) is not int for key in numbered) or len(numbered) != len(names):
        return None
    if sorted(numbered, key=str) != sorted(range(len(numbered)), key=str):
        return None
    return [numbered[number] for number in range(len(numbered))]
