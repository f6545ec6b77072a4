"""What the errors of both packages have in common: a base that is told to users, and the exit codes that scripts read."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from enum import IntEnum


class Exit(IntEnum):
    """Why a command ended; a signal is 128 and its number, as a shell tells it."""

    ERROR = 1
    USAGE = 2
    DATA = 3
    CHECKPOINT = 4
    SERVICE = 5
    """A server or an engine that does not answer, lacks something, or refuses."""
    DISK_FULL = 6
    GPU_LOST = 7


class ToldError(Exception):
    """Base of every error raised on purpose: it says what, where and the remedy, and is printed without a traceback."""

    exit_code: int = Exit.ERROR


FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors of a write for which there is no room: on the disk, in the quota, or by a limit on a file's size."""


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the known word closest to `word`, or an empty string."""
    close = closest(word, known)
    return "" if close is None else f" (did you mean {close!r}?)"


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word closest to `word`; None where none comes near."""
    from difflib import get_close_matches  # slow to import, and few commands need it

    return next(iter(get_close_matches(word, list(known), n=1)), None)
