"""Keep credentials out of what is written down and sent."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

_IN_ADDRESS = re.compile(r"//[^/@\s]+@")
_IN_QUERY = re.compile(r"(?i)([?&](?:[\w-]*(?:password|secret|token|signature|key))=)[^&\s'\"]+")
_SECRET_NAME = re.compile(r"(PASSWORD|SECRET|TOKEN|ACCESS_KEY|API_KEY)")
_SHORTEST = 6
"""Shorter values of variables are no secrets, and would blot out ordinary words."""


def without_credentials(text: str) -> str:
    """Return `text` with the `user:password@` of every address in it left out, and secrets of its query blotted out."""
    if "//" not in text:
        return text
    return _IN_QUERY.sub(r"\1***", _IN_ADDRESS.sub("//", text))


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
