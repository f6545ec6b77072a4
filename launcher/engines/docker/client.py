"""The launcher's docker-py client: one client with one pool of connections serves all threads of a command."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from docker import APIClient, ContextAPI
from docker.errors import APIError, NotFound
from docker.transport import UnixHTTPAdapter
from docker.utils import kwargs_from_env

from launcher.parallel import MOST_AT_ONCE

ACTION_TIMEOUT_S = 120.0
"""Creating and starting a container may wait for disks and drivers."""


class Client(APIClient):
    """A client of the engine that Docker's own client would use under `environment`, with one version of the API.

    A GET times out after `patience_s`, every other request after ACTION_TIMEOUT_S. A response with a status of 400 or
    more raises APIError, or NotFound for 404, whatever its body is.
    """

    def __init__(self, environment: Mapping[str, str], version: str, patience_s: float) -> None:
        super().__init__(
            **_access(environment), version=version, timeout=patience_s, max_pool_size=MOST_AT_ONCE
        )
        adapter = self.get_adapter(self.base_url)
        if isinstance(adapter, UnixHTTPAdapter):
            place = f"http+unix://{adapter.socket_path}"
            self.trust_env = (
                False  # a socket has no proxy, and requests would look for a password in ~/.netrc each time
            )
            self.mount(self.base_url, _OnePool(place, patience_s, max_pool_size=MOST_AT_ONCE))

    def speak(self, version: str) -> None:
        """Use this version of the engine's API from now on."""
        self._version = version

    def request(self, method: str, url: str, **options: Any) -> Any:
        """Send a request; every method of docker-py calls this one."""
        if method != "GET":
            options["timeout"] = ACTION_TIMEOUT_S
        answer = super().request(method, url, **options)
        if answer.status_code >= 400:
            raise _refusal(answer)
        return answer


class _OnePool(UnixHTTPAdapter):
    """An adapter that reuses a socket's connections for all requests.

    docker-py has one pool per URL, so no connection is reused for another container. If there are more URLs than pools,
    other threads close a pool that a thread has just received.
    """

    def get_connection(self, url: str, proxies: Any = None) -> Any:
        """Return the pool, the same for every URL."""
        return super().get_connection("", proxies)


def _refusal(answer: Any) -> APIError:
    try:
        words = str(answer.json()["message"])
    except (ValueError, KeyError, TypeError):
        words = answer.text.strip() or f"status {answer.status_code}"
    kind = NotFound if answer.status_code == 404 else APIError
    return kind(words, response=answer, explanation=words)


def _access(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the address and the certificates that Docker's own client would use."""
    access: dict[str, Any] = kwargs_from_env(environment)
    if "base_url" not in access:
        access = {**ContextAPI.kwargs_from_context(environment=environment), **access}
    return access
