"""An engine's HTTP interface, for the few requests that every command makes: list, inspect, start, signal, remove.

Over a socket of this machine the standard library asks them, since `import docker` alone would take a third of the time
of `status` and of `kill-all`. What an engine elsewhere is asked goes through docker-py, as does all else.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.message import Message
from typing import Any, Protocol
from urllib.parse import quote, urlencode, urlsplit


class Refused(Exception):
    """An engine's answer to a request that it does not grant."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status

    @property
    def vanished(self) -> bool:
        """Whether there is no such container, or soon will be; Podman says 500 when it goes while it is asked about."""
        words = str(self).lower()
        return self.status == 404 or "no such container" in words or "marked for removal" in words


@dataclass(frozen=True)
class Answer:
    """What came back, refusals included."""

    status: int
    headers: Message | Mapping[str, str]
    """Looked up in whatever case."""
    body: bytes

    def document(self) -> Any:
        """Return the JSON document, None for an empty answer; raises Refused, and HTTPException for no JSON."""
        self.refuse()
        try:
            return json.loads(self.body) if self.body else None
        except ValueError:
            raise http.client.HTTPException(f"no JSON: {self.body[:80]!r}") from None

    def refuse(self) -> None:
        """Raise Refused if that is the answer."""
        if self.status < 400:
            return
        try:
            words = json.loads(self.body)["message"]
        except (ValueError, KeyError, TypeError):
            words = self.body.decode(errors="replace").strip() or http.client.responses.get(self.status, "")
        raise Refused(self.status, str(words))


class Api(Protocol):
    """A way to the engine; several threads may use it at once."""

    def ask(self, method: str, target: str, timeout_s: float) -> Answer:
        """Send a request without a body to `target`, a path with its query."""


class SocketApi:
    """The engine behind a unix socket of this machine. Raises OSError or HTTPException when it does not answer."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._mine = threading.local()  # a connection takes one request at a time

    def ask(self, method: str, target: str, timeout_s: float) -> Answer:
        """Send a request; each that is sent here can be repeated, and is when its connection turns out to be closed."""
        kept: _Connection | None = getattr(self._mine, "connection", None)
        if kept is not None:
            try:
                return self._send(kept, method, target, timeout_s)
            except (ConnectionError, http.client.BadStatusLine):
                pass  # the engine was started again since
        return self._send(_Connection(self._path), method, target, timeout_s)

    def _send(self, connection: _Connection, method: str, target: str, timeout_s: float) -> Answer:
        self._mine.connection = None
        try:
            connection.set_timeout(timeout_s)
            connection.request(method, target)
            response = connection.getresponse()
            answer = Answer(response.status, response.headers, response.read())
        except BaseException:
            connection.close()
            raise
        self._mine.connection = connection
        return answer


class SdkApi:
    """The same through docker-py, which knows TLS; `client` returns this thread's. Raises what docker-py raises."""

    def __init__(self, client: Callable[[], Any]) -> None:
        self._client = client

    def ask(self, method: str, target: str, timeout_s: float) -> Answer:
        """Send a request."""
        session = self._client().api
        answer = session.request(method, f"{session.base_url}{target}", timeout=timeout_s)
        return Answer(answer.status_code, answer.headers, answer.content)


class _Connection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def set_timeout(self, seconds: float) -> None:
        """Wait so long for each part of an answer."""
        self.timeout = seconds
        if self.sock is not None:
            self.sock.settimeout(seconds)

    def connect(self) -> None:
        """Open the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def socket_path(address: str) -> str | None:
    """Return the path of an address that is a unix socket; None for any other."""
    parts = urlsplit(address)
    return "/" + f"{parts.netloc}{parts.path}".lstrip("/") if parts.scheme == "unix" else None


def request_target(version: str, path: str, query: Mapping[str, Any]) -> str:
    """Return the request's target; True is written as 1, and a filter as JSON."""
    values = {
        name: json.dumps(value) if isinstance(value, dict) else int(value) if value is True else value
        for name, value in query.items()
    }
    return f"/v{version}{quote(path)}" + (f"?{urlencode(values)}" if values else "")


def refusal_in(error: BaseException) -> Refused | None:
    """Return the engine's refusal that `error` tells of, ours or docker-py's; None for anything else."""
    if isinstance(error, Refused):
        return error
    import docker.errors  # not above: it takes its time, and only a failure pays for it here

    if isinstance(error, docker.errors.APIError):
        return Refused(error.status_code or 500, str(error.explanation or error))
    return None


def is_transport(error: BaseException) -> bool:
    """Return whether `error`, no refusal, means that the engine could not be asked, ours or docker-py's."""
    import docker.errors
    import urllib3.exceptions

    return isinstance(
        error,
        (OSError, http.client.HTTPException, docker.errors.DockerException, urllib3.exceptions.HTTPError),
    )
