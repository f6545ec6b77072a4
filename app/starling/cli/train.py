"""Train a detector, or search its hyperparameters together with all other workers: `python train.py --help`."""

from __future__ import annotations

import os
import sys

from starling.cli.command import run_command, speaks
from starling.core.errors import StarlingError
from starling.core.settings.train import TrainCommand, parse_args


def main(argv: list[str] | None = None) -> int:
    """Parse, train or search, and return the exit code."""
    return run_command(lambda: _parse(argv), _run, lambda command: command.config.debug, _tell_launcher)


def _tell_launcher(error: BaseException) -> None:
    """Record the error where `launcher status` looks, even if there is no run yet."""
    if (replica := os.environ.get("STARLING_REPLICA")) and speaks():
        from starling.core.worker_status import tell_failure
        from starling.outputs.run_dir import runs_root

        words = str(error) if isinstance(error, StarlingError) else f"{type(error).__name__}: {error}"
        tell_failure(runs_root(), replica, words)


def _parse(argv: list[str] | None) -> TrainCommand:
    """Return the parsed command line; in a ClearML agent without arguments, the command line of the agent's task."""
    words = sys.argv[1:] if argv is None else argv
    if not words and os.environ.get("CLEARML_TASK_ID"):
        from starling.tracking.clearml.client.remote import arguments_of_task

        words = arguments_of_task()
    return parse_args(words)


def _run(command: TrainCommand) -> None:
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        # If a process is gone, torch prints the stack of each attempt to reach it; one line of this program says it.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Imported here so that --help and a wrong flag answer at once, without torch.
    from starling.progress import Progress, Silence, on_console

    with on_console(Progress() if speaks() else Silence(Progress())):
        _train(command)


def _train(command: TrainCommand) -> None:
    if command.config.remote:
        from starling.tracking.clearml.client.remote import enqueue_training
        from starling.training.training import read_hyp

        enqueue_training(command.config, read_hyp(command.config))
    elif command.config.evolve:
        from starling.search.training import search

        search(command.config)
    else:
        from starling.training.training import train

        train(command)
