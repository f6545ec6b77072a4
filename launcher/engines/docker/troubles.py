"""docker-py's errors in plain words: what an engine refused, or why it could not be reached."""

from __future__ import annotations

import http.client
from collections.abc import Iterator

import docker.errors
import requests
import urllib3.exceptions

ANSWER_TIMEOUT_S = 3.0
"""A socket without an answer after this time counts as hung; `status` must report that within 5 s."""

DENIED, NO_SOCKET = "permission denied", "no socket there"

TRANSPORT = (OSError, docker.errors.DockerException, urllib3.exceptions.HTTPError)
"""Errors that mean, unless they are a refusal, that the engine could not be reached; requests' errors are OSErrors."""

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
    """Return the engine's own message."""
    return str(error.explanation)


def is_gone(error: docker.errors.APIError) -> bool:
    """Return whether the container does not exist or is being removed; Podman then answers with status 500."""
    words = refusal(error).lower()
    return error.status_code == 404 or "no such container" in words or "marked for removal" in words


def is_idle(error: docker.errors.APIError) -> bool:
    """Return whether no signal can reach the container because it does not run: status 409, or Podman's message."""
    return error.status_code == 409 or "container state improper" in refusal(error)


def reason(error: BaseException) -> str:
    """Return why the engine could not be reached, from the innermost error, which requests and urllib3 wrap."""
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
