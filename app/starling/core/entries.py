"""Paths as people write them into descriptions and lists of images: with the separators and roots of another machine."""

from __future__ import annotations

import re
import unicodedata

_DRIVE = re.compile(r"[A-Za-z]:")
_QUOTES = ("'", '"')


def written(entry: str) -> tuple[str, ...]:
    r"""Return what an entry may mean, the likeliest first: as it stands, `\` read as `/`, without quotes around it.

    Each also in the other encodings of its accents.
    """
    bare = entry[1:-1] if len(entry) > 2 and entry[0] == entry[-1] and entry[0] in _QUOTES else entry
    spelled = (entry, bare, bare.replace("\\", "/"))
    return tuple(dict.fromkeys(form for one in spelled for form in encodings(one)))


def encodings(name: str) -> tuple[str, ...]:
    """Return a name as it is, and with its accents composed (NFC) and taken apart (NFD), as macOS writes them."""
    if name.isascii():
        return (name,)
    return tuple(dict.fromkeys((name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))))


def spellings(entry: str) -> tuple[str, ...]:
    r"""Return what an entry of a description may mean, the likeliest first: all of `written`, then without a leading `../`.

    Some exporters write `../train/images` for a folder beside the description.
    """
    plain = written(entry)
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
