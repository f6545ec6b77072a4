"""SIGTERM and the first SIGINT ask for a stop after the step; a second SIGINT stops at once."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self

from starling.errors import Stopped


class StopSignal:
    """Remember the signal that asked for a stop; a context manager that puts the old handlers back."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signum is not None:
            os._exit(128 + signum)  # asked twice: no more saving, the checkpoint on disk is whole
        self.signum = signum

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for."""
        return self.signum is not None

    def raise_if_requested(self) -> None:
        """Raise Stopped if a stop was asked for."""
        if self.signum is not None:
            raise Stopped(self.signum)
