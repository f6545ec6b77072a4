"""Paths from users and files.

Impossible paths are refused before any system call gets them. Paths in descriptions and lists of images may have the
separators and roots of another machine.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from starling.core.words import shown

MOST_NAME_BYTES = 255
"""Linux's limit for one name in a path."""
MOST_PATH_BYTES = 4095

_DRIVE = re.compile(r"[A-Za-z]:")
_QUOTES = ("'", '"')


def at_home(path: str | Path) -> Path:
    """Return the path with `~` replaced by the home folder; `~name` stays unchanged if that user has no home."""
    return Path(os.path.expanduser(path))


def real_path(path: str | Path) -> Path:
    """Return the path with its links followed as far as possible; a loop of links stays in the path.

    `Path.resolve` raises RuntimeError at a loop, which any user can make in a folder that others may write.
    """
    return Path(os.path.realpath(path))


def lost_folder() -> str | None:
    """Return the problem if the current folder has been removed; None if it exists."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the current folder has been removed, and relative paths start there; go to one that exists (cd), and start again"
    return None


def impossible(words: Iterable[str]) -> str | None:
    """Return the problem of the first word of a command line that cannot be a path; None if all words can.

    Addresses (`https://…`) and lists (`0,1,2`) may be longer than a path.
    """
    for word in words:
        value = word.partition("=")[2] if word.startswith("--") and "=" in word else word
        is_path = "://" not in value and "," not in value
        problem = path_problem(value) if is_path or "\0" in value else None
        if problem:
            return f"{shown(word, 60)}: {problem}; correct the path"
    return None


def path_problem(value: str) -> str | None:
    """Return why `value` cannot be a path of a file in any file system; None if it can."""
    if "\0" in value:
        return "holds a NUL, which no path can"
    if value.startswith("~") and os.path.expanduser(value).startswith("~"):
        return "no user of that name has a home folder"
    if len(os.fsencode(value)) > MOST_PATH_BYTES:
        return f"longer than {MOST_PATH_BYTES} bytes, which no path can be"
    if any(len(os.fsencode(part)) > MOST_NAME_BYTES for part in value.split("/")):
        return f"has a name longer than {MOST_NAME_BYTES} bytes, which no file can have"
    return None


def absolute(path: Path) -> Path:
    """Return `path` expanded and absolute, with links kept."""
    return Path(os.path.abspath(at_home(path)))


def written(entry: str) -> tuple[str, ...]:
    r"""Return the possible meanings of an entry, the likeliest first: unchanged, without quotes, with `/` for `\`.

    Each is also returned in the other encodings of its accents.
    """
    bare = entry[1:-1] if len(entry) > 2 and entry[0] == entry[-1] and entry[0] in _QUOTES else entry
    spelled = (entry, bare, bare.replace("\\", "/"))
    return tuple(dict.fromkeys(form for one in spelled for form in encodings(one)))


def encodings(name: str) -> tuple[str, ...]:
    """Return a name unchanged, with composed accents (NFC), and with decomposed accents (NFD), as macOS writes them."""
    if name.isascii():
        return (name,)
    return tuple(dict.fromkeys((name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))))


def spellings(entry: str) -> tuple[str, ...]:
    r"""Return the possible paths of a description's entry, the likeliest first: `written`, then those without `../`.

    Some exporters write `../train/images` for a folder beside the description.
    """
    plain = written(entry)
    return tuple(dict.fromkeys((*plain, *(one.removeprefix("../") for one in plain))))


def parts_of(entry: str) -> list[str]:
    r"""Return the names in a path with any separators, without `.`, `..`, the root and a drive (`C:`)."""
    parts = entry.replace("\\", "/").split("/")
    if parts and _DRIVE.fullmatch(parts[0]):
        parts = parts[1:]
    return [part for part in parts if part not in ("", ".", "..")]


def tails(entry: str) -> list[str]:
    """Return the trailing paths of an entry, the longest first: `a/b/c`, `b/c`, `c`."""
    parts = parts_of(entry)
    return ["/".join(parts[drop:]) for drop in range(len(parts))]
