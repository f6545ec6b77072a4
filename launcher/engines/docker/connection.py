"""The connection to an engine: address, time limits, and errors in plain words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from docker.errors import APIError

from launcher.engines.docker.client import Client
from launcher.engines.docker.troubles import (
    ANSWER_TIMEOUT_S,
    DENIED,
    NO_SOCKET,
    TRANSPORT,
    reason,
    refusal,
)
from launcher.errors import EngineError
from launcher.hosts.address import socket_path
from launcher.hosts.host import Host

OLDEST_API, OLDEST_ENGINE = "1.41", "20.10"
"""The oldest versions with cgroup v2, `init` and device requests."""


class Manner(NamedTuple):
    """How to connect to one kind of engine, and what messages call it."""

    title: str
    remedy: str
    """What to do if the engine does not answer."""
    version: str | None = None
    """The version of the API; None: the engine's newest."""
    patience_s: float = ANSWER_TIMEOUT_S
    """The time limit for an answer, after the engine has answered the first ping."""
    has_group: bool = False
    """Whether a group of users may use the engine's socket."""


class Connection:
    """The connection to an engine that answers.

    Several threads may use it at once. Raises EngineError if no engine answers, or if the engine is too old.
    """

    def __init__(self, manner: Manner, host: Host) -> None:
        self._manner = manner
        self._host = host
        self._socket = socket_path(host.engine_address)
        with self.translated():
            self.client = Client(host.environment, manner.version or OLDEST_API, manner.patience_s)
            hello = self._greet()
            if manner.version is None:
                newest = hello.get("Api-Version", "0")
                self._refuse_old(newest)
                self.client.speak(newest)
        self.is_podman = "Libpod-Api-Version" in hello
        """Whether Podman answers, possibly at Docker's address."""

    def containers(self, **filters: Sequence[str]) -> Sequence[dict[str, Any]]:
        """Return the containers that pass all filters, in any state, in the short form of a list."""
        found: Sequence[dict[str, Any]] = self.client.containers(all=True, filters=filters)
        return found

    @contextlib.contextmanager
    def translated(self, what: str = "") -> Iterator[None]:
        """Turn the engine's and the transport's errors into EngineError; `what` names the subject of the request."""
        try:
            yield
        except EngineError:
            raise
        except APIError as error:
            subject = f"{what}: " if what else ""
            raise EngineError(f"{subject}{self._manner.title} refuses: {refusal(error)}") from error
        except TRANSPORT as error:
            if (lost := self._host.lost()) is not None:
                raise lost from error
            raise EngineError(self._silence(reason(error))) from error

    def _silence(self, why: str) -> str:
        """Return a message that the engine does not answer, with the remedy."""
        if why == DENIED and self._manner.has_group:
            from launcher.engines.docker.checks import permission_words

            return permission_words(self._socket)
        if why == NO_SOCKET and self._socket:
            why = f"no socket at {self._socket}"
        from starling.core.redaction import masked

        where = "" if self._socket else f" at {masked(self._host.engine_address)}"
        return f"{self._manner.title}{where} does not answer ({why}); {self._manner.remedy}"

    def _greet(self) -> Mapping[str, str]:
        """Return the headers of the engine's ping, which name the engine; always with the short time limit."""
        ping = f"{self.client.base_url}/_ping"
        headers: Mapping[str, str] = self.client.get(ping, timeout=ANSWER_TIMEOUT_S).headers
        return headers

    def _refuse_old(self, version: str) -> None:
        if _numbers(version) >= _numbers(OLDEST_API):
            return
        release = self.client.version(api_version=False).get("Version", "of unknown version")
        raise EngineError(
            f"the Docker engine is too old: {release}, API {version}; this launcher needs {OLDEST_ENGINE} "
            f"(API {OLDEST_API}) or newer: upgrade it, or use --engine local"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
