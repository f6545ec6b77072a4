"""Train YOLOv5-family detectors, search their hyperparameters, and track both. Never imports `launcher` or Docker.

The names in API are loaded at their first use: `import starling` needs only the standard library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from starling.core.package import VERSION

if TYPE_CHECKING:
    from starling import settings as settings
    from starling.training.reporting import hooks as hooks

__version__ = VERSION

API = {"hooks": "starling.training.reporting.hooks", "settings": "starling.settings"}
"""Each public name with its module."""

__all__ = ["__version__", *API]


def __getattr__(name: str) -> Any:
    if name not in API:
        raise AttributeError(f"module 'starling' has no attribute {name!r}")
    return import_module(API[name])
