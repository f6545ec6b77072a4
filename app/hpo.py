#!/usr/bin/env python3
"""Search hyperparameters over clones of a ClearML task: `python hpo.py --help`."""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run by its path: what is importable is the package, not the folder's inside
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from app.command import run_command
from app.config.hpo_config import HpoConfig, parse_args


def main(argv: list[str] | None = None) -> int:
    """Parse, search, and return the exit code."""
    return run_command(lambda: parse_args(argv), _run, debug=lambda config: config.debug)


def _run(config: HpoConfig) -> None:
    # Imported here so that --help and a wrong flag answer at once, without Optuna.
    from app.search.task_search import search_tasks

    search_tasks(config)


if __name__ == "__main__":
    sys.exit(main())
