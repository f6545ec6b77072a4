#!/usr/bin/env python3
"""Validate a detector, or several as one: `python val.py --help`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __package__ in (None, ""):  # run by its path: what is importable is the package, not the folder's inside
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from app.command import run_command
from app.config.val_config import ValConfig
from app.config.val_flags import parse_args


def main(argv: list[str] | None = None) -> int:
    """Parse, validate, and return the exit code."""
    return run_command(lambda: parse_args(argv), _run, debug=lambda config: config.debug)


def _run(config: ValConfig) -> None:
    # Imported here so that --help and a wrong flag answer at once, without torch.
    from app.engine.evaluation import evaluate, study

    report = study(config) if config.task == "study" else evaluate(config)
    if config.json:
        print(json.dumps(report, allow_nan=False), flush=True)


if __name__ == "__main__":
    sys.exit(main())
