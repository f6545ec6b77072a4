"""SIGTERM and the first SIGINT request a stop after the current step; a second SIGINT stops at once."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self

from starling.errors import Stopped


class StopSignal:
    """Records the signal that requested a stop; a context manager that restores the old handlers."""

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
            os._exit(
                128 + signum
            )  # a second request: stop without saving; the checkpoint on disk is complete
        self.signum = signum

    @property
    def requested(self) -> bool:
        """Whether a stop was requested."""
        return self.signum is not None

    def raise_if_requested(self) -> None:
        """Raise Stopped if a stop was requested."""
        if self.signum is not None:
            raise Stopped(self.signum)
