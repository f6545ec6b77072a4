"""Paths that a user or a file gives: impossible ones are found at the edge, before any system call meets them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from starling.core.words import shown

MOST_NAME_BYTES = 255
"""Linux's limit for one name in a path."""
MOST_PATH_BYTES = 4095


def at_home(path: str | Path) -> Path:
    """Return the path with `~` replaced by the home folder; a `~somebody` without a home stays as it is."""
    return Path(os.path.expanduser(path))


def real_path(path: str | Path) -> Path:
    """Return the path with its links followed as far as they lead somewhere; a loop of links stays in it.

    `Path.resolve` ends with RuntimeError at a loop, which anybody can make in a folder that others may write.
    """
    return Path(os.path.realpath(path))


def lost_folder() -> str | None:
    """Return what is wrong with a current folder that somebody has removed; None where it is there."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the current folder has been removed, and relative paths start there; go to one that exists (cd), and start again"
    return None


def impossible(words: Iterable[str]) -> str | None:
    """Return what is wrong with the first word of a command line that no path can be; None where all can.

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
    """Return what makes `value` no path of a file in any file system; None where it may be one."""
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
    """Return `path` expanded and absolute, its links kept as they are."""
    return Path(os.path.abspath(at_home(path)))
