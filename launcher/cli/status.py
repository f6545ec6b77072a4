"""`launcher status`: show replicas, their devices, states and progress."""

from __future__ import annotations

import sys

import click

from launcher.cli.context import Target, shared
from launcher.options.config_file import ConfiguredCommand


@click.command(cls=ConfiguredCommand)
@click.option("--watch", is_flag=True, help="Refresh until Ctrl-C.")
@click.option("--interval", default=2.0, show_default=True, type=click.FloatRange(min=0.2), metavar="SECONDS")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@shared
@click.argument("names", nargs=-1)
def status(target: Target, watch: bool, interval: float, as_json: bool, names: tuple[str, ...]) -> None:
    """Show replicas, their devices, states and progress. NAMES: replicas, or fleets as project/name.

    Exits 0 when every replica runs, has finished or was stopped; 1 when a replica has failed, or there is no replica.
    """
    from launcher.status.watch import show_status, watch_status

    chosen = target.open_engine()
    if watch and not as_json:
        watch_status(chosen, names, interval)
    else:
        sys.exit(show_status(chosen, names, as_json=as_json))
