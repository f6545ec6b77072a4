"""The errors of training, and the printing of errors."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from starling.core.errors import Exit, StarlingError


class ServerError(StarlingError):
    """A server that the command needs does not answer."""

    exit_code = Exit.SERVICE


class Stopped(StarlingError):
    """The run was stopped by a signal after saving a checkpoint; it can be resumed."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class Pruned(StarlingError):
    """A training of a search was ended before its last epoch because it had fallen behind the others."""

    def __init__(self, reason: str, epoch: int) -> None:
        super().__init__(reason)
        self.epoch = epoch


TOLD = "STARLING_TOLD"
"""Environment variable with a file that one of several processes makes after it has printed their error."""


def print_error(line: str, environment: Mapping[str, str] = os.environ) -> None:
    """Print one line to stderr, and make the file of `$STARLING_TOLD`; a failing stderr is ignored."""
    with suppress(OSError):
        # A name on the command line need not be UTF-8, and stderr may not encode it.
        print(line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr, flush=True)
    if told := environment.get(TOLD):
        with suppress(OSError):
            Path(told).touch()


_CV2_NO_MEMORY = -4
"""OpenCV's `Error::StsNoMem`."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of any library means that device or host memory ran out.

    torch raises `OutOfMemoryError` on CUDA and a plain RuntimeError on the CPU; OpenCV raises `cv2.error` with a code.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if type(error).__module__ == "cv2" and getattr(error, "code", None) == _CV2_NO_MEMORY:
        return True
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
