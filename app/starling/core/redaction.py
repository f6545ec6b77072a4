"""Keep credentials out of what is written down and sent."""

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
"""Schemes whose `user@` is a mere name; with others it may be a token."""
_LONGEST_SCHEME = 40
_NO_PASSWORD = frozenset({"", "x-oauth-basic"})
"""What stands after the colon where the name before it is the token."""
_SECRET_NAME = re.compile(r"(PASSWORD|SECRET|TOKEN|ACCESS_KEY|API_KEY)")
_SHORTEST = 6
"""Shorter values of variables are no secrets, and would blot out ordinary words."""


def without_credentials(text: str) -> str:
    """Return `text` with the `user:password@` of every address in it left out, and secrets of its query blotted out."""
    return _without(text, lambda found: "")


def masked(text: str) -> str:
    """Return `text` with `***` for every secret that `without_credentials` leaves out, so that its place is seen.

    Names of users stay where they cannot be tokens.
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
    """Blot out the values that the environment holds under names such as MLFLOW_TRACKING_PASSWORD."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        values = {
            value
            for name, value in environment.items()
            if _SECRET_NAME.search(name) and not name.endswith("_FILE") and len(value) >= _SHORTEST
        }
        self._secrets = sorted(values, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """Return `text` as anyone may read it."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return without_credentials(text)
