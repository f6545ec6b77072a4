"""`launcher logs`: what replicas print."""

from __future__ import annotations

import click

from launcher.cli.context import Target, shared
from launcher.options.config_file import ConfiguredCommand


@click.command(cls=ConfiguredCommand)
@click.option("-f", "--follow", is_flag=True, help="Go on until the replicas end, or Ctrl-C.")
@click.option("--tail", type=click.IntRange(min=0), metavar="LINES", help="Only the last lines of each.")
@click.option("--since", metavar="WHEN", help="Only what was said since: 10m, 1h30m, 2026-03-01T14:00.")
@shared
@click.argument("names", nargs=-1)
def logs(target: Target, follow: bool, tail: int | None, since: str | None, names: tuple[str, ...]) -> None:
    """Print the output of replicas: of several in the order of time, each line marked with its replica."""
    import time

    from launcher.status.output import print_logs
    from starling.core.instants import parse_since

    moment = None if since is None else parse_since(since, time.time())
    print_logs(target.open_engine(), names, follow=follow, tail=tail, since=moment)
