"""The errors of training and of its files, and what a refused write or read means."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from starling.core.errors import FULL, DiskFull, Exit, StarlingError, UsageError
from starling.core.folder import LinkRefused
from starling.core.words import shown


class ServerError(StarlingError):
    """A server that the command needs does not answer."""

    exit_code = Exit.SERVICE


class Stopped(StarlingError):
    """The run was stopped by a signal after saving a checkpoint; it can be resumed."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class Pruned(StarlingError):
    """A training of a search was ended before its last epoch, as it had fallen behind the others."""

    def __init__(self, reason: str, epoch: int) -> None:
        super().__init__(reason)
        self.epoch = epoch


class FileRefused(OSError):
    """A file of ours that cannot be taken for one: a pipe, a device, or a second name of somebody else's file."""

    def __init__(self, path: Path, problem: str, remedy: str = "remove it, and start again") -> None:
        super().__init__(errno.EINVAL, problem, str(path))
        self.remedy = remedy


class DiskRefused(OSError):
    """A write, or its sync, that the disk refused."""


@contextmanager
def disk_write(path: Path) -> Iterator[None]:
    """Around a write to a file that may have no name: raise DiskRefused, with the path, where the disk refuses."""
    try:
        yield
    except OSError as error:
        if isinstance(error, DiskRefused) or error.errno not in FULL | {errno.EIO}:
            raise
        raise DiskRefused(error.errno, error.strerror, str(path)) from error


def refusal(error: OSError, path: Path | str | None = None) -> StarlingError | None:
    """Return what a refused write means wherever it happens: a link or a full disk; None for any other error.

    `path` is where, for an error that does not say.
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


TOLD = "STARLING_TOLD"
"""Environment variable: the file that one of several processes makes when it has said why they end."""


def print_error(line: str, environment: Mapping[str, str] = os.environ) -> None:
    """Print one line to stderr, and leave word that it was said; a stderr that takes none changes no exit code."""
    with suppress(OSError):
        # A name on the command line need not be UTF-8, and not every stream takes it then.
        print(line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr, flush=True)
    if told := environment.get(TOLD):
        with suppress(OSError):
            Path(told).touch()


@contextmanager
def readable(kind: type[StarlingError]) -> Iterator[None]:
    """Raise `kind`, with the path and the remedy, for a path of the user's that cannot be, or may not be looked at.

    Around a block, or as a function's decorator.
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


_CV2_NO_MEMORY = -4
"""OpenCV's `Error::StsNoMem`."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that device or host memory ran out, whatever raised it.

    torch raises `OutOfMemoryError` on CUDA and a plain RuntimeError on the CPU, OpenCV its one error with a code.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if type(error).__module__ == "cv2" and getattr(error, "code", None) == _CV2_NO_MEMORY:
        return True
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
