"""`launcher stop`: ask replicas to save and end."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from launcher.cli.context import open_engine, shared
from launcher.console import say
from launcher.engines.limits import STOP_GRACE_S
from launcher.options.config_file import ConfiguredCommand


@click.command(cls=ConfiguredCommand)
@click.option(
    "--grace", default=float(STOP_GRACE_S), show_default=True, type=click.FloatRange(min=0), metavar="SECONDS"
)
@shared
@click.argument("names", nargs=-1)
def stop(engine: str, runs: Path, grace: float, names: tuple[str, ...]) -> None:
    """Ask replicas to save and end (SIGTERM), kill those that outlast the grace, and report.

    Without NAMES: all of yours. They stay listed, and the same `up` resumes them. Exits 1 when one had to be killed,
    or had failed.
    """
    from launcher.fleet import bring_up as fleet
    from launcher.status.selection import select
    from launcher.status.watch import show_status

    chosen = open_engine(engine, runs)
    states = select(chosen.list(), names)
    if not states:
        click.echo("none: nothing to stop")
        return
    fleet.stop(chosen, states, grace_s=grace, say=say)
    sys.exit(show_status(chosen, [state.name for state in states]))
