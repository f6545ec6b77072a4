"""The error tree of both packages: what is raised on purpose says what, where and the remedy, and carries its exit code."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from enum import IntEnum

from starling.core.words import shown

_MOST_FIELD, _MOST_VALUE = 4096, 400
"""Characters of a message: a field may carry a path, a value may be a whole file."""


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


class StarlingError(Exception):
    """Base of every error raised on purpose; printed without a traceback unless `--debug`."""

    exit_code: int = Exit.ERROR


class UsageError(StarlingError):
    """A command line, a configuration or a plan that cannot work."""

    exit_code = Exit.USAGE


class ConfigError(UsageError):
    """One setting with a value that cannot work: `ConfigError("batch_size", 0, "must be at least 1")`."""

    def __init__(self, field: str, value: object, problem: str) -> None:
        super().__init__(f"{shown(field, _MOST_FIELD)}={_repr(value)}: {problem}")
        self.field = field


class DataError(StarlingError):
    """A dataset, image or label file that is missing or cannot be used."""

    exit_code = Exit.DATA


class CheckpointError(StarlingError):
    """A checkpoint or weights file that is missing or cannot be read, trusted, matched or written."""

    exit_code = Exit.CHECKPOINT


class DiskFull(StarlingError):
    """A write that the disk refused: it is full, over its quota, or failing. What was written before stays."""

    exit_code = Exit.DISK_FULL


class GpuLost(StarlingError):
    """A GPU that no longer answers: fallen off the bus, or reset under the training."""

    exit_code = Exit.GPU_LOST


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


def _repr(value: object) -> str:
    try:
        return shown(repr(value), _MOST_VALUE)
    except (ValueError, RecursionError):  # a whole number of thousands of digits, lists in lists without end
        return f"a {type(value).__name__}"
