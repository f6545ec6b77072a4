"""Translate a refused read or write of a file into the errors of the error tree."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from starling.core.errors import FULL, DiskFull, StarlingError, UsageError
from starling.core.files.folder import LinkRefused
from starling.core.words import shown


class FileRefused(OSError):
    """A path of our own file holds a pipe, a device, or a hard link to a file that may belong to another user."""

    def __init__(self, path: Path, problem: str, remedy: str = "remove it, and start again") -> None:
        super().__init__(errno.EINVAL, problem, str(path))
        self.remedy = remedy


class DiskRefused(OSError):
    """The disk refused a write or a sync."""


@contextmanager
def disk_write(path: Path) -> Iterator[None]:
    """Raise DiskRefused with the path if the disk refuses a write in the block, whose own error may lack the path."""
    try:
        yield
    except OSError as error:
        if isinstance(error, DiskRefused) or error.errno not in FULL | {errno.EIO}:
            raise
        raise DiskRefused(error.errno, error.strerror, str(path)) from error


def refusal(error: OSError, path: Path | str | None = None) -> StarlingError | None:
    """Return the user's error for a refused write: a link, another kind of file, or a full disk; None for other errors.

    `path` is the place if the error does not name it.
    """
    where = error.filename or path
    place = f"{where}: " if where else ""
    if isinstance(error, LinkRefused):
        target = ""
        with suppress(OSError):
            target = f" to {os.readlink(error.filename)}"
        return UsageError(
            f"{place}is a symbolic link{target}, and links below the runs folder are not followed; "
            "remove the link, or give that place as an absolute --project"
        )
    if isinstance(error, FileRefused):
        return UsageError(f"{place}{error.strerror}; {error.remedy}")
    if isinstance(error, DiskRefused) or error.errno in FULL:
        return DiskFull(
            f"{place}cannot be written ({error.strerror}); what was written before is intact. "
            "Free some space, or choose another --project, and start again"
        )
    return None


@contextmanager
def readable(kind: type[StarlingError]) -> Iterator[None]:
    """Raise `kind`, with the path and the remedy, for a user's path that is too long or must not be accessed.

    For use around a block or as a decorator of a function.
    """
    try:
        yield
    except PermissionError as error:
        raise kind(
            f"{error.filename}: cannot be read: {error.strerror} for uid {os.geteuid()}; check the owner and the mode "
            "of the file and of the folders above it"
        ) from None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise kind(
            f"{shown(error.filename)}: {error.strerror}: no file can be there; correct the path"
        ) from None
