"""Search hyperparameters over clones of a ClearML task: `python hpo.py --help`."""

from __future__ import annotations

from starling.cli.command import run_command
from starling.core.settings.hpo import HpoConfig, parse_args


def main(argv: list[str] | None = None) -> int:
    """Parse, search, and return the exit code."""
    return run_command(lambda: parse_args(argv), _run, debug=lambda config: config.debug)


def _run(config: HpoConfig) -> None:
    # Imported here so that --help and a wrong flag answer at once, without Optuna.
    from starling.progress import Progress, Silence, on_console
    from starling.tracking.clearml.search import search_tasks

    with on_console(Silence() if config.json else Progress()):
        search_tasks(config)
