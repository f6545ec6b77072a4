"""Remove credentials from texts that are written or sent."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping

_IN_ADDRESS = re.compile(r"//([^/\s]+)@")
_IN_QUERY = re.compile(
    r"(?i)([?&](?:[\w-]*(?:password|passwd|pass|pwd|secret|token|signature|sig|key|credential))=)[^&\s'\"]+"
)
_NAMES_ALONE = re.compile(
    r"(?i)\b(?:postgres|postgresql|mysql|mariadb|ssh|sftp|ftp|tcp|rtsp)(?:\+\w{1,20})?:$"
)
"""Schemes in which `user@` is only a name; in other schemes it may be a token."""
_LONGEST_SCHEME = 40
_NO_PASSWORD = frozenset({"", "x-oauth-basic"})
"""Values after the colon that mean that the name before it is the token."""
_SECRET_NAME = re.compile(r"(PASSWORD|SECRET|TOKEN|ACCESS_KEY|API_KEY)")
_SHORTEST = 6
"""The shortest secret; hiding shorter values of variables would also hide ordinary words."""


def without_credentials(text: str) -> str:
    """Return `text` without the `user:password@` of its addresses, and with `***` for the secrets in their queries."""
    return _without(text, lambda found: "")


def masked(text: str) -> str:
    """Return `text` with `***` in the place of every secret that `without_credentials` removes.

    Names of users stay if they cannot be tokens.
    """
    return _without(text, _mask)


def _without(text: str, login: Callable[[re.Match[str]], str]) -> str:
    if "//" not in text:
        return text
    return _IN_QUERY.sub(r"\1***", _IN_ADDRESS.sub(lambda found: f"//{login(found)}", text))


def _mask(found: re.Match[str]) -> str:
    name, colon, password = found[1].partition(":")
    if password not in _NO_PASSWORD:
        return f"{name}:***@"
    if _NAMES_ALONE.search(found.string[max(0, found.start() - _LONGEST_SCHEME) : found.start()]):
        return f"{found[1]}@"
    return f"***{colon}{password}@"


class Redaction:
    """Hides the values of environment variables with names such as MLFLOW_TRACKING_PASSWORD."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        values = {
            value
            for name, value in environment.items()
            if _SECRET_NAME.search(name) and not name.endswith("_FILE") and len(value) >= _SHORTEST
        }
        self._secrets = sorted(values, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """Return `text` without secrets."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return without_credentials(text)
