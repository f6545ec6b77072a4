"""`launcher stop`: ask replicas to save and end."""

from __future__ import annotations

import sys

import click

from launcher.cli.context import Target, shared
from launcher.engines.limits import STOP_GRACE_S
from launcher.options.config_file import ConfiguredCommand


@click.command(cls=ConfiguredCommand)
@click.option(
    "--grace", default=float(STOP_GRACE_S), show_default=True, type=click.FloatRange(min=0), metavar="SECONDS"
)
@shared
@click.argument("names", nargs=-1)
def stop(target: Target, grace: float, names: tuple[str, ...]) -> None:
    """Ask replicas to save and end (SIGTERM), kill those that still run after the grace, and report.

    Without NAMES: all of your replicas. Stopped replicas stay listed, and the same `up` resumes them. Exits 1 when a
    replica had to be killed, or had failed.
    """
    from launcher.fleet.end import stop as stop_replicas
    from launcher.status.selection import select
    from launcher.status.watch import show_status

    chosen = target.open_engine()
    states = select(chosen.list(), names)
    if not states:
        click.echo("none: nothing to stop")
        return
    stop_replicas(chosen, states, grace_s=grace)
    sys.exit(show_status(chosen, [state.name for state in states]))
