"""Find the dataset that `--data` means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from starling.config.shipped import find_config
from starling.core.files.safe_open import runs_root
from starling.data.fetch.acquire import CLEARML_SCHEME
from starling.data.fetch.download import Show


def find_dataset(data: str, say: Callable[[str], None], show: Show = lambda line: None) -> Path:
    """Return the description that `--data` means: a file, a shipped one, or that of a ClearML dataset, then fetched.

    Raises DataError where there is none.
    """
    if data.startswith(CLEARML_SCHEME):
        from starling.data.fetch.clearml_set import fetch_clearml_set  # other trainings do without

        return fetch_clearml_set(data, runs_root(), say=say, show=show)
    return find_config("datasets", data)
