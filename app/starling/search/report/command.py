"""The winner's command line: the search's own training, longer, with what it found."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starling.outputs.run_dir import runs_root
from starling.search.outcome import BEST_HYP

LONG = 300
"""Epochs of the training that is proposed, if the search's own were fewer: a usual full training."""
_TAKEN = ("weights", "cfg", "data", "imgsz", "batch_size", "optimizer", "freeze")
_SWITCHES = ("single_cls", "cos_lr", "rect", "quad", "image_weights", "multi_scale", "noautoanchor")
_SHORT = {"imgsz": "--img", "batch_size": "--batch"}
_DEFAULTS = {"optimizer": "SGD", "freeze": [0], "cfg": ""}
"""Values that need no flag."""


def winner_command(settings: Mapping[str, Any], directory: Path) -> str:
    """Return a `train.py` command, quoted for a shell; empty where the study does not hold the settings."""
    if not settings.get("data"):
        return ""
    epochs = settings.get("epochs")
    words = ["python", "train.py"]
    for field in _TAKEN:
        value = settings.get(field)
        if value is None or value == _DEFAULTS.get(field):
            continue
        values = value if isinstance(value, list) else [value]
        words += [_SHORT.get(field, "--" + field.replace("_", "-")), *map(str, values)]
    words += ["--hyp", _from_here(directory / BEST_HYP)]
    words += ["--epochs", str(max(epochs, LONG) if isinstance(epochs, int) else LONG)]
    words += [f"--{field.replace('_', '-')}" for field in _SWITCHES if settings.get(field) is True]
    if settings.get("project"):
        words += ["--project", str(settings["project"])]
    words += ["--name", f"{directory.name}-winner"]
    return shlex.join(words)


def _from_here(path: Path) -> str:
    """Return a path below the runs folder as `runs/…`, which holds inside a container as outside; else as it is."""
    root = runs_root()
    return str(Path(root.name) / path.relative_to(root)) if path.is_relative_to(root) else str(path)
