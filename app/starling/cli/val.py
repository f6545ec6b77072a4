"""Validate a detector, or several as an ensemble: `python val.py --help`."""

from __future__ import annotations

import json

from starling.cli.command import run_command
from starling.core.settings.val import ValConfig, parse_args


def main(argv: list[str] | None = None) -> int:
    """Parse, validate, and return the exit code."""
    return run_command(lambda: parse_args(argv), _run, debug=lambda config: config.debug)


def _run(config: ValConfig) -> None:
    # Imported here so that --help and a wrong flag answer at once, without torch.
    from starling.evaluation.evaluation import evaluate, study
    from starling.progress import Progress, on_console

    with on_console(Progress()):
        report = study(config) if config.task == "study" else evaluate(config)
    if config.json:
        print(json.dumps(report, allow_nan=False), flush=True)
