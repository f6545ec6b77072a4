"""The trackers by name: which are enabled, and how to open one. Only opening a tracker imports its library."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from starling import settings
from starling.settings import Settings
from starling.tracking.clearml.client.credentials import is_configured
from starling.tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackerKind:
    """One tracker: its name, the package it needs, whether it is enabled, how it is opened."""

    name: str
    package: str
    is_wanted: Callable[[Settings, Mapping[str, str]], bool]
    open: Callable[[Path, Mapping[str, str]], Tracker]
    """Takes the runs folder and the environment; returns the open tracker."""

    @property
    def is_installed(self) -> bool:
        """Whether the tracker's package is installed; checked without importing it."""
        return importlib.util.find_spec(self.package) is not None


def _open_mlflow(runs: Path, environment: Mapping[str, str]) -> Tracker:
    from starling.tracking.mlflow.tracker import MlflowTracker

    return MlflowTracker(runs, environment, register=settings.read().register)


def _open_tensorboard(runs: Path, environment: Mapping[str, str]) -> Tracker:
    from starling.tracking.tensorboard import TensorBoardTracker

    return TensorBoardTracker()


def _open_clearml(runs: Path, environment: Mapping[str, str]) -> Tracker:
    from starling.tracking.clearml.tracker import ClearmlTracker

    return ClearmlTracker(runs, environment)


TRACKERS = {
    kind.name: kind
    for kind in (
        TrackerKind(
            name="mlflow",
            package="mlflow",
            is_wanted=lambda chosen, environment: chosen.mlflow,
            open=_open_mlflow,
        ),
        TrackerKind(
            name="tensorboard",
            package="tensorboard",
            is_wanted=lambda chosen, environment: chosen.tensorboard,
            open=_open_tensorboard,
        ),
        TrackerKind(
            name="clearml",
            package="requests",
            is_wanted=lambda chosen, environment: chosen.clearml and is_configured(environment),
            open=_open_clearml,
        ),
    )
}
"""The trackers by name; the names of cursor files contain the same names."""


def wanted_trackers(environment: Mapping[str, str] = os.environ) -> list[TrackerKind]:
    """Return the enabled trackers. Raises ConfigError for a damaged settings file."""
    chosen = settings.read()
    return [kind for kind in TRACKERS.values() if kind.is_wanted(chosen, environment)]
