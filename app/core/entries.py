"""Paths as people write them into descriptions and lists of images: with the separators and roots of another machine."""

from __future__ import annotations

import re

_DRIVE = re.compile(r"[A-Za-z]:")


def spellings(entry: str) -> tuple[str, ...]:
    r"""Return what an entry may mean, the likeliest first: as it stands, `\` read as `/`, both without a leading `../`.

    Windows writes `images\train`. Some exporters write `../train/images` for a folder beside the description.
    """
    slashed = entry.replace("\\", "/")
    plain = dict.fromkeys((entry, slashed))
    return tuple(dict.fromkeys((*plain, *(one.removeprefix("../") for one in plain))))


def parts_of(entry: str) -> list[str]:
    r"""Return the names in a path, whatever its separators; `.`, `..`, the root and a drive (`C:`) are left off."""
    parts = entry.replace("\\", "/").split("/")
    if parts and _DRIVE.fullmatch(parts[0]):
        parts = parts[1:]
    return [part for part in parts if part not in ("", ".", "..")]


def tails(entry: str) -> list[str]:
    """Return the paths that an entry ends in, the longest first: `a/b/c`, `b/c`, `c`."""
    parts = parts_of(entry)
    return ["/".join(parts[drop:]) for drop in range(len(parts))]
