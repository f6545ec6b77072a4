"""docker-py's client, as the launcher uses it: one of them, with one pool of connections, for all threads of a command."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from docker import APIClient, ContextAPI
from docker.errors import APIError, NotFound
from docker.transport import UnixHTTPAdapter
from docker.utils import kwargs_from_env

from launcher.parallel import MOST_AT_ONCE

ACTION_TIMEOUT_S = 120.0
"""Creating and starting may wait for disks and drivers."""


class Client(APIClient):
    """The engine to which `environment` leads Docker's own client, spoken to in one version of its interface.

    A question (GET) is answered within `patience_s` or not at all; whatever acts has its own time. Every refusal raises
    APIError, NotFound where there is no such thing, whatever its body is.
    """

    def __init__(self, environment: Mapping[str, str], version: str, patience_s: float) -> None:
        super().__init__(
            **_access(environment), version=version, timeout=patience_s, max_pool_size=MOST_AT_ONCE
        )
        adapter = self.get_adapter(self.base_url)
        if isinstance(adapter, UnixHTTPAdapter):
            place = f"http+unix://{adapter.socket_path}"
            self.trust_env = (
                False  # a socket has no proxy, and no password in ~/.netrc to look for at each request
            )
            self.mount(self.base_url, _OnePool(place, patience_s, max_pool_size=MOST_AT_ONCE))

    def speak(self, version: str) -> None:
        """Use this version of the engine's interface from now on."""
        self._version = version

    def request(self, method: str, url: str, **options: Any) -> Any:
        """Send a request, as every method of docker-py does in the end."""
        if method != "GET":
            options["timeout"] = ACTION_TIMEOUT_S
        answer = super().request(method, url, **options)
        if answer.status_code >= 400:
            raise _refusal(answer)
        return answer


class _OnePool(UnixHTTPAdapter):
    """A socket's connections, used again for whatever is asked next.

    docker-py itself has a pool for each URL, so that no container's connection serves another's; and where there are more
    URLs than it keeps pools, one that a thread has just been given is closed by the others.
    """

    def get_connection(self, url: str, proxies: Any = None) -> Any:
        """Return the pool."""
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
