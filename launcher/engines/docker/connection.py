"""The way to an engine: its address, how long it is waited for, and its troubles in plain words."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.engines.docker.api import (
    Api,
    SdkApi,
    SocketApi,
    is_transport,
    refusal_in,
    request_target,
    socket_path,
)
from launcher.errors import EngineError
from launcher.hosts.reach import box, engine_address
from starling.core.redaction import masked

ANSWER_TIMEOUT_S = 3.0
"""A socket that has not answered a question by then is hung; `status` must say so within 5 s."""

ACTION_TIMEOUT_S = 120.0
"""Creating and starting may wait for disks and drivers."""

OLDEST_API, OLDEST_ENGINE = (1, 41), "20.10"
"""Cgroup v2, `init` and device requests as they are used here."""

_DENIED, _NO_SOCKET = "permission denied", "no socket there"


@dataclass(frozen=True)
class Manner:
    """How one kind of engine is spoken to, and spoken of."""

    title: str
    remedy: str
    """What to do when it does not answer."""
    version: str | None = None
    """The version of the interface; None: the engine's newest."""
    patience_s: float = ANSWER_TIMEOUT_S
    """How long a question is waited for, once it is known that somebody answers."""
    has_group: bool = False
    """Whether a group of users may use its socket."""


class Connection:
    """An engine that answers, at `address` or where DOCKER_HOST or the Docker context leads.

    Several threads may use it at once. Raises EngineError when nobody answers, or an engine that is too old.
    """

    def __init__(self, manner: Manner, address: str | None = None) -> None:
        self._manner = manner
        self._address = address
        self._socket = socket_path(address or engine_address())
        self._api: Api = (
            SocketApi(self._socket) if self._socket and not self.remote else SdkApi(lambda: self.asking)
        )
        # docker-py's clients are not made for several threads at once: each thread has its own.
        self._clients = threading.local()
        self._version = manner.version
        with self.translated():
            hello = self._api.ask("GET", "/_ping", ANSWER_TIMEOUT_S)
            hello.refuse()
            if self._version is None:
                self._version = hello.headers.get("api-version", "0")
                self._refuse_old(self._version)
        self.is_podman = "libpod-api-version" in hello.headers
        """Whether it is Podman that answers, at Docker's address too."""

    @property
    def remote(self) -> bool:
        """Whether the engine is on another machine."""
        return box() is not None or self._socket is None

    def ask(self, path: str, **query: Any) -> Any:
        """Return the answer to a question, as its JSON says it; raises Refused, and what a transport raises."""
        return self._request("GET", path, query, self._manner.patience_s)

    def act(self, method: str, path: str, **query: Any) -> None:
        """Have something done, however long it takes; raises likewise."""
        self._request(method, path, query, ACTION_TIMEOUT_S)

    def containers(self, **filters: Sequence[str]) -> Sequence[Mapping[str, Any]]:
        """Return the containers that pass all filters, whatever their state, in the short form of a list."""
        found: Sequence[Mapping[str, Any]] = self.ask("/containers/json", all=True, filters=filters)
        return found

    @property
    def asking(self) -> Any:
        """This thread's docker-py client for questions, which are answered soon or not at all."""
        return self._client("asking", self._manner.patience_s)

    @property
    def acting(self) -> Any:
        """This thread's docker-py client that waits long enough for actions."""
        return self._client("acting", ACTION_TIMEOUT_S)

    @contextlib.contextmanager
    def translated(self, what: str = "") -> Iterator[None]:
        """Turn the engine's and the transport's errors into EngineError; `what` was asked for when they came."""
        try:
            yield
        except EngineError:
            raise
        except Exception as error:
            title, remedy = self._manner.title, self._manner.remedy
            if refused := refusal_in(error):
                subject = f"{what}: " if what else ""
                raise EngineError(f"{subject}{title} refuses: {refused}") from error
            if not is_transport(error):
                raise
            there = box()
            if there is not None and there.ended:
                raise there.lost() from error
            reason = _reason(error)
            if reason == _NO_SOCKET and self._socket:
                reason = f"no socket at {self._socket}"
            where = "" if self._socket else f" at {masked(self._address or engine_address())}"
            denied = self._denied() if reason == _DENIED else ""
            raise EngineError(denied or f"{title}{where} does not answer ({reason}); {remedy}") from error

    def _request(self, method: str, path: str, query: Mapping[str, Any], timeout_s: float) -> Any:
        target = request_target(self._version or "", path, query)
        return self._api.ask(method, target, timeout_s).document()

    def _client(self, purpose: str, timeout_s: float) -> Any:
        client = getattr(self._clients, purpose, None)
        if client is None:
            import docker

            if self._address is None:
                client = docker.DockerClient.from_env(timeout=timeout_s, version=self._version)
            else:
                client = docker.DockerClient(base_url=self._address, timeout=timeout_s, version=self._version)
            setattr(self._clients, purpose, client)
        return client

    def _refuse_old(self, version: str) -> None:
        if tuple(int(part) for part in version.split(".")[:2]) >= OLDEST_API:
            return
        release = self.ask("/version").get("Version", "of unknown version")
        raise EngineError(
            f"the Docker engine is too old: {release}, API {version}; this launcher needs {OLDEST_ENGINE} "
            f"(API {'.'.join(map(str, OLDEST_API))}) or newer: upgrade it, or use --engine local"
        )

    def _denied(self) -> str:
        """Say whose the socket is that the caller may not use."""
        if not self._manner.has_group:
            return ""
        from launcher.engines.docker.checks import permission_words

        return permission_words(self._socket)


def _reason(error: BaseException) -> str:
    text = str(error)
    for sign, words in (
        ("timed out", f"no answer within {ANSWER_TIMEOUT_S:g} s"),
        ("No such file", _NO_SOCKET),
        ("FileNotFoundError", _NO_SOCKET),
        ("Permission denied", _DENIED),
        ("Connection refused", "connection refused"),
    ):
        if sign in text:
            return words
    return text.splitlines()[0][:160] if text else type(error).__name__
