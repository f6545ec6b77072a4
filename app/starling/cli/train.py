"""Train a detector, or search its hyperparameters together with every other worker: `python train.py --help`."""

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
    """Leave the reason where `launcher status` looks, also of an error before there is a run."""
    if (replica := os.environ.get("STARLING_REPLICA")) and speaks():
        from starling.core.worker_status import tell_failure
        from starling.outputs.run_dir import runs_root

        words = str(error) if isinstance(error, StarlingError) else f"{type(error).__name__}: {error}"
        tell_failure(runs_root(), replica, words)


def _parse(argv: list[str] | None) -> TrainCommand:
    """Return what the words ask for; without any, in a ClearML agent, what its task asks for."""
    words = sys.argv[1:] if argv is None else argv
    if not words and os.environ.get("CLEARML_TASK_ID"):
        from starling.tracking.clearml.client.remote import arguments_of_task

        words = arguments_of_task()
    return parse_args(words)


def _run(command: TrainCommand) -> None:
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        # Where a process is gone, torch prints the stack of each try to reach it; one line of ours says it.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Imported here so that --help and a wrong flag answer at once, without torch.
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
