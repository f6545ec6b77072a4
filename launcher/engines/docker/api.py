"""An engine's HTTP interface, for the few requests that every command makes: list, inspect, start, signal, remove.

Over a socket of this machine they need no library, and docker-py's import alone takes a fifth of what `kill-all` may. What
an engine elsewhere is asked goes through docker-py, as does all else.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote, urlencode, urlsplit

from starling.core.plain_json import parse_json


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
    headers: Mapping[str, str]
    """By names in small letters."""
    body: bytes

    def document(self) -> Any:
        """Return the JSON document, None for an empty answer; raises Refused, and ConnectionError for no JSON."""
        self.refuse()
        try:
            return parse_json(self.body) if self.body else None
        except ValueError:
            raise ConnectionError(f"no JSON came back: {self.body[:80]!r}") from None

    def refuse(self) -> None:
        """Raise Refused if that is the answer."""
        if self.status < 400:
            return
        try:
            words = parse_json(self.body)["message"]
        except (ValueError, KeyError, TypeError):
            words = self.body.decode(errors="replace").strip() or f"status {self.status}"
        raise Refused(self.status, str(words))


class Api(Protocol):
    """A way to the engine; several threads may use it at once."""

    def ask(self, method: str, target: str, timeout_s: float) -> Answer:
        """Send a request without a body to `target`, a path with its query."""


class SocketApi:
    """The engine behind a unix socket of this machine. Raises OSError when it does not answer.

    Each request has a connection of its own, in HTTP/1.0: the answer is what comes until the stream ends.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def ask(self, method: str, target: str, timeout_s: float) -> Answer:
        """Send a request, and wait so long for each part of the answer."""
        parts = []
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as end:
            end.settimeout(timeout_s)
            end.connect(self._path)
            end.sendall(
                f"{method} {target} HTTP/1.0\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode()
            )
            while part := end.recv(65536):
                parts.append(part)
        return _read_answer(b"".join(parts))


def _read_answer(content: bytes) -> Answer:
    head, gap, body = content.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    version, _, status = first.partition(" ")
    if not version.startswith("HTTP/1.") or not status[:3].isdigit():
        raise ConnectionError(f"no HTTP came back: {content[:80]!r}")
    fields = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in fields}
    if not gap or headers.get("content-length", str(len(body))) != str(len(body)):
        raise ConnectionError("the answer broke off")
    return Answer(int(status[:3]), headers, body)


class SdkApi:
    """The same through docker-py, which knows TLS; `client` returns this thread's. Raises what docker-py raises."""

    def __init__(self, client: Callable[[], Any]) -> None:
        self._client = client

    def ask(self, method: str, target: str, timeout_s: float) -> Answer:
        """Send a request."""
        session = self._client().api
        answer = session.request(method, f"{session.base_url}{target}", timeout=timeout_s)
        return Answer(answer.status_code, answer.headers, answer.content)


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
        (OSError, docker.errors.DockerException, urllib3.exceptions.HTTPError),
    )
