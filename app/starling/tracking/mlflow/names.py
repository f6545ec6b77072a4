"""Convert names and values to the forms that MLflow accepts, and tags of the end of a run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

KEY_LENGTH = 250
VALUE_LENGTH = 6000
TAG_LENGTH = 5000
STATUS_TAG, REASON_TAG, PRUNED_TAG = "starling.status", "starling.reason", "starling.pruned"
NOTE_TAG = "mlflow.note.content"
"""Tag with the description of a run on MLflow's page, which users may edit too."""


def metric_key(name: str) -> str:
    """Return `name` in MLflow's alphabet: `precision(B)` -> `precision_B`; `mAP_0.5:0.95` stays."""
    return _shortened(re.sub(r"[^/\w.\- :]+", "_", name).strip("_") or "_")


def flat_params(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested parameters as flat text (`hyp.lr0`), with names and values cut to MLflow's limits."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flat_params(value, f"{name}."))
        else:
            text = str(value)
            flat[metric_key(name)] = text if len(text) <= VALUE_LENGTH else text[: VALUE_LENGTH - 1] + "…"
    return flat


def end_tags(status: str, reason: str, stored: Mapping[str, str]) -> dict[str, str]:
    """Return the tags for the end of a run, because MLflow has no status `pruned`. A note of the user stays."""
    tags = {STATUS_TAG: status}
    if reason:
        tags[REASON_TAG] = reason[:TAG_LENGTH]
    if status == "pruned":
        tags[PRUNED_TAG] = "true"
    if NOTE_TAG not in stored or _is_our_note(stored):
        tags[NOTE_TAG] = tags.get(REASON_TAG, status)
    return tags


def outdated_tags(stored: Mapping[str, str]) -> list[str]:
    """Return the names of the tags, in order of deletion, that recorded an end of a run that now continues."""
    note = [NOTE_TAG] if _is_our_note(stored) else []
    return note + [tag for tag in (REASON_TAG, PRUNED_TAG, STATUS_TAG) if tag in stored]


def _is_our_note(stored: Mapping[str, str]) -> bool:
    return NOTE_TAG in stored and stored[NOTE_TAG] in {stored.get(REASON_TAG), stored.get(STATUS_TAG)}


def _shortened(key: str) -> str:
    """Shorten a long name, and append a digest, so that two long names stay different."""
    if len(key) <= KEY_LENGTH:
        return key
    return f"{key[: KEY_LENGTH - 9]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
