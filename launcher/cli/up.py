"""`launcher up`: start one replica per device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from launcher.cli.context import Target, shared
from launcher.options.completion import TrainingWord
from launcher.options.config_file import ConfiguredCommand


@click.command(
    cls=ConfiguredCommand,
    epilog="""\b
Examples:
  launcher up --gpus 1-5 --memory 20g -- --data ~/blood/bccd.yaml --weights '' \\
      --cfg yolov5n.yaml --img 320 --epochs 10 --project blood --name search --evolve 60
  launcher up --gpus 0-3 --ddp -- --data ~/blood/bccd.yaml --weights '' --cfg yolov5n.yaml --batch 64
  launcher up --cpu 2 --engine local -- --data bccd.yaml --weights '' --cfg yolov5n.yaml""",
)
@click.option(
    "--gpus",
    metavar="LIST",
    help="all, free, free:2, 3, 1-5, 0,2-4, MIG slices (3:0), or UUIDs: one replica each.",
)
@click.option(
    "--cpu", "cpus", type=int, metavar="N", help="N replicas without a GPU, each with its own cores."
)
@click.option("--ddp", is_flag=True, help="One training on all of the devices, in one replica.")
@click.option("--force", is_flag=True, help="Share GPUs that others hold.")
@click.option(
    "--memory", metavar="SIZE", help="Limit for each device, swap included [90 % of the machine's, shared]."
)
@click.option("--shm", metavar="SIZE", help="/dev/shm for each device [a quarter of its memory, 1g at most].")
@click.option("--image", default="starling:latest", show_default=True, help="Never pulled: see --build.")
@click.option("--build", is_flag=True, help="Build the image first, from the project's folder.")
@click.option("--network", default="bridge", show_default=True, help="An existing Docker network to join.")
@click.option(
    "--tracking", is_flag=True, help="Log to the servers of `launcher track up`: network, address and login."
)
@click.option(
    "--user", metavar="UID:GID", help="Who replicas run as [you; for root: the owner of the runs folder]."
)
@click.option(
    "--env", "env_names", multiple=True, metavar="NAME", help="Pass this variable to replicas; repeatable."
)
@click.option(
    "--env-file",
    "env_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Pass NAME=value lines; repeatable.",
)
@click.option(
    "--max-restarts",
    default=3,
    show_default=True,
    type=click.IntRange(min=0),
    metavar="N",
    help="Restart a crashed trainer at most N times.",
)
@click.option(
    "--recreate", is_flag=True, help="Stop a fleet whose command differs, and start it with this command."
)
@click.option(
    "--settle",
    default=0.0,
    show_default=True,
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Watch the replicas for this time; if one fails, remove everything that this `up` started.",
)
@click.option("--dry-run", is_flag=True, help="Show what would start, and start nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: the plan as JSON.")
@shared
@click.argument("training_args", nargs=-1, type=TrainingWord(), metavar="-- TRAINING ARGUMENTS…")
def up(target: Target, **options: Any) -> None:
    """Start one replica per device. All replicas run the same training arguments (those after `--`).

    The same `up` again changes nothing, except that dead replicas start again and resume. The trackers' variables
    (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, MLFLOW_RUN, CLEARML_*) are passed on automatically.
    """
    from launcher.cli.up_steps import run_up

    run_up(target, options)
