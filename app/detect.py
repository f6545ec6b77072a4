#!/usr/bin/env python3
"""Find objects in pictures, videos and streams: `python detect.py --help`."""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run by its path: what is importable is the package, not the folder's inside
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from app.command import run_command
from app.config.detect_config import DetectConfig
from app.config.detect_flags import parse_args


def main(argv: list[str] | None = None) -> int:
    """Parse, detect, and return the exit code."""
    return run_command(lambda: parse_args(argv), _run, debug=lambda config: config.debug)


def _run(config: DetectConfig) -> None:
    # Imported here so that --help and a wrong flag answer at once, without torch.
    from app.engine.detecting import detect

    detect(config)


if __name__ == "__main__":
    sys.exit(main())
