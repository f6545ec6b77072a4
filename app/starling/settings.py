"""Settings that apply to all commands; `starling settings` shows and changes them.

The file is `$STARLING_RUNS/settings.json` if that variable is set (all replicas of a fleet then share the settings),
else `$XDG_CONFIG_HOME/starling/settings.json`, by default `~/.config/starling/settings.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from starling.core.errors import ConfigError, UsageError, suggest
from starling.core.files.atomic import write_atomic
from starling.core.files.refusals import refusal
from starling.core.files.safe_open import is_below_top, read_file
from starling.core.paths import at_home
from starling.core.plain_json import parse_json, read_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """All settings with their defaults."""

    mlflow: bool = True
    """Send runs to MLflow: the server of `MLFLOW_TRACKING_URI`, else the database under `<runs>/mlflow`."""

    clearml: bool = True
    """Send runs to ClearML, to the server of its credentials; off without credentials."""

    tensorboard: bool = True
    """Write an event file for TensorBoard into each run directory."""

    register: bool = True
    """Register the best weights of a finished run in MLflow's registry, as a model that can be served."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not isinstance(value, bool):
                raise ConfigError(item.name, value, "must be True or False")


def settings_path(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the settings file, which need not exist."""
    if runs := environment.get("STARLING_RUNS"):
        return Path(runs) / "settings.json"
    config = environment.get("XDG_CONFIG_HOME") or at_home("~/.config")
    return Path(config) / "starling" / "settings.json"


def read() -> Settings:
    """Return the current settings; raises ConfigError for a damaged file."""
    path = settings_path()
    try:
        stored = parse_json(read_file(path)) if is_below_top(path) else read_json(path)
        if not isinstance(stored, dict):
            raise ValueError("not a mapping")
    except FileNotFoundError:
        return Settings()
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            "settings", str(path), f"unreadable ({error}); run starling settings reset"
        ) from None
    return _checked(stored)


def update(changes: Mapping[str, Any]) -> Settings:
    """Change the given settings, keep the others, and return all settings: `settings.update({"mlflow": False})`.

    Raises ConfigError for an unknown name or a wrong value, and then changes nothing.
    """
    changed = _checked({**asdict(read()), **changes})
    _write(changed)
    return changed


def reset() -> Settings:
    """Restore the defaults and return them."""
    defaults = Settings()
    _write(defaults)
    return defaults


def _checked(values: Mapping[str, Any]) -> Settings:
    known = [item.name for item in fields(Settings)]
    for name, value in values.items():
        if name not in known:
            raise ConfigError(
                name, value, f"no such setting{suggest(name, known)}; known: {', '.join(known)}"
            )
    return Settings(**values)


def _write(changed: Settings) -> None:
    path = settings_path()
    try:
        write_atomic(path, json.dumps(asdict(changed), indent=2) + "\n")
    except OSError as error:
        raise refusal(error, path) or UsageError(
            f"{path}: cannot be written ({error.strerror}); free it, or set STARLING_RUNS"
        ) from None
