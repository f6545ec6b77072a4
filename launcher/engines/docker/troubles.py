"""docker-py's errors in plain words: what an engine refused, or why it could not be asked."""

from __future__ import annotations

import http.client
from collections.abc import Iterator

import docker.errors
import requests
import urllib3.exceptions

ANSWER_TIMEOUT_S = 3.0
"""A socket that has not answered a question by then is hung; `status` must say so within 5 s."""

DENIED, NO_SOCKET = "permission denied", "no socket there"

TRANSPORT = (OSError, docker.errors.DockerException, urllib3.exceptions.HTTPError)
"""What means, where it is no refusal, that the engine could not be asked; requests' errors are OSErrors."""

_REASONS: tuple[tuple[type[BaseException], str], ...] = (
    (TimeoutError, f"no answer within {ANSWER_TIMEOUT_S:g} s"),
    (FileNotFoundError, NO_SOCKET),
    (PermissionError, DENIED),
    (ConnectionRefusedError, "connection refused"),
    (http.client.RemoteDisconnected, "the connection was closed without an answer"),
    (http.client.BadStatusLine, "no HTTP came back"),
    (http.client.IncompleteRead, "the answer broke off"),
)


def refusal(error: docker.errors.APIError) -> str:
    """Return the engine's own words."""
    return str(error.explanation)


def is_gone(error: docker.errors.APIError) -> bool:
    """Return whether there is no such container, or soon will be; Podman says 500 when it goes while it is asked about."""
    words = refusal(error).lower()
    return error.status_code == 404 or "no such container" in words or "marked for removal" in words


def is_idle(error: docker.errors.APIError) -> bool:
    """Return whether the container does not run, so that no signal can reach it: 409, or Podman's words for it."""
    return error.status_code == 409 or "container state improper" in refusal(error)


def reason(error: BaseException) -> str:
    """Return why the engine could not be asked: the innermost error tells, requests and urllib3 wrap it."""
    causes = list(_causes(error))
    for kind, words in _REASONS:
        if any(isinstance(cause, kind) for cause in causes):
            return words
    if isinstance(error, requests.JSONDecodeError):
        return f"no JSON came back: {error.doc[:80]!r}"
    text = str(causes[-1])
    return text.splitlines()[0][:160] if text else type(causes[-1]).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
