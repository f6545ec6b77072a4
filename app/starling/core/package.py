"""This package's version and path, and the command line that starts it in another process."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

VERSION = "0.2.0"
"""The version of both packages."""
PARENT = Path(__file__).resolve().parents[2]
"""The folder that holds the package: `app/` of a checkout or an image, or an installation's site-packages."""


def command(*words: str) -> list[str]:
    """Return the command line of `starling WORDS`. The current directory is not importable in the new process (`-P`)."""
    return [sys.executable, "-P", "-m", "starling", *words]


def python_path(environment: Mapping[str, str] = os.environ) -> str:
    """Return the PYTHONPATH with which a new process finds this package before any other of the same name."""
    return os.pathsep.join(filter(None, (str(PARENT), environment.get("PYTHONPATH", ""))))
