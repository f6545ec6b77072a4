"""Names and values as MLflow takes them, and addresses as anyone may read them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

KEY_LENGTH = 250
VALUE_LENGTH = 6000
TAG_LENGTH = 5000


def metric_key(name: str) -> str:
    """Return `name` as MLflow takes it: `precision(B)` -> `precision_B`, `mAP_0.5:0.95` as it is."""
    return _shortened(re.sub(r"[^/\w.\- :]+", "_", name).strip("_") or "_")


def flat_params(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested parameters as flat text (`hyp.lr0`), names and values cut to what MLflow takes."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flat_params(value, f"{name}."))
        else:
            text = str(value)
            flat[metric_key(name)] = text if len(text) <= VALUE_LENGTH else text[: VALUE_LENGTH - 1] + "…"
    return flat


def _shortened(key: str) -> str:
    """Cut a long name, with a digest in place of the rest, so that two long names stay two."""
    if len(key) <= KEY_LENGTH:
        return key
    return f"{key[: KEY_LENGTH - 9]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
