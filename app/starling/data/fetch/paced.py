"""HTTP connections that end if the transfer stands still, in headers as in the body of the answer."""

from __future__ import annotations

import http.client
import io
import socket
import urllib.request
from collections.abc import Callable
from typing import Any

from starling.core.budget import BudgetExceeded, Pace

CLOCK: Callable[[], float] | None = None
"""Another clock, for tests."""


class _PacedReader(io.RawIOBase):
    """Reads from a socket, headers included, and counts the bytes."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self._pace = Pace() if CLOCK is None else Pace(CLOCK)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Read available bytes. Raises TimeoutError if the transfer stands still."""
        count = self._raw.readinto(buffer)
        try:
            self._pace.step(count or 0)
        except BudgetExceeded as error:
            raise TimeoutError(f"the server stands still: {error}") from None
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _PacedResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, **keywords: Any) -> None:
        super().__init__(sock, *arguments, **keywords)
        buffered: Any = self.fp
        self.fp = io.BufferedReader(_PacedReader(buffered.detach()))


class _PacedConnection(http.client.HTTPConnection):
    response_class = _PacedResponse


class _PacedTlsConnection(http.client.HTTPSConnection):
    response_class = _PacedResponse


class PacedHttp(urllib.request.HTTPHandler):
    """Opens http:// URLs."""

    def http_open(self, req: urllib.request.Request) -> Any:
        """Return the answer."""
        return self.do_open(_PacedConnection, req)  # type: ignore[arg-type]


class PacedHttps(urllib.request.HTTPSHandler):
    """Opens https:// URLs."""

    def https_open(self, req: urllib.request.Request) -> Any:
        """Return the answer."""
        return self.do_open(_PacedTlsConnection, req, context=self._context)  # type: ignore[attr-defined, arg-type]
