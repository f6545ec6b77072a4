"""The error tree of both packages: each error names the problem, the place and the remedy, and has an exit code."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from enum import IntEnum

from starling.core.words import shown

_MOST_FIELD, _MOST_VALUE = 4096, 400
"""The most characters of each in a message: a field may hold a path, a value a whole file."""


class Exit(IntEnum):
    """The exit codes of commands; a signal gives 128 plus its number, as in a shell."""

    ERROR = 1
    USAGE = 2
    DATA = 3
    CHECKPOINT = 4
    SERVICE = 5
    """A server or an engine does not answer, lacks something, or refuses."""
    DISK_FULL = 6
    GPU_LOST = 7


class StarlingError(Exception):
    """Base of all errors for the user, printed without a traceback unless `--debug` is given."""

    exit_code: int = Exit.ERROR


class UsageError(StarlingError):
    """A command line, a configuration or a plan is invalid."""

    exit_code = Exit.USAGE


class ConfigError(UsageError):
    """A setting has an invalid value: `ConfigError("batch_size", 0, "must be at least 1")`."""

    def __init__(self, field: str, value: object, problem: str) -> None:
        super().__init__(f"{shown(field, _MOST_FIELD)}={_repr(value)}: {problem}")
        self.field = field


class DataError(StarlingError):
    """A dataset, image or label file is missing or unusable."""

    exit_code = Exit.DATA


class CheckpointError(StarlingError):
    """A checkpoint or weights file is missing or cannot be read, trusted, matched or written."""

    exit_code = Exit.CHECKPOINT


class DiskFull(StarlingError):
    """A write failed because the disk is full, over its quota, or failing. Files written before are intact."""

    exit_code = Exit.DISK_FULL


class GpuLost(StarlingError):
    """A GPU no longer answers: it has fallen off the bus, or was reset during the training."""

    exit_code = Exit.GPU_LOST


FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors of a write without room: the disk, the quota, or the limit on a file's size is reached."""


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the known word closest to `word`, or an empty string."""
    close = closest(word, known)
    return "" if close is None else f" (did you mean {close!r}?)"


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word closest to `word`; None if none is similar."""
    from difflib import get_close_matches  # slow to import, and few commands need it

    return next(iter(get_close_matches(word, list(known), n=1)), None)


def _repr(value: object) -> str:
    try:
        return shown(repr(value), _MOST_VALUE)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or lists nested too deep
        return f"a {type(value).__name__}"
