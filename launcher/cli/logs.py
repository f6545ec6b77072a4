"""`launcher logs`: print the output of replicas."""

from __future__ import annotations

import click

from launcher.cli.context import Target, shared
from launcher.options.config_file import ConfiguredCommand


@click.command(cls=ConfiguredCommand)
@click.option("-f", "--follow", is_flag=True, help="Follow the output until the replicas end, or Ctrl-C.")
@click.option(
    "--tail", type=click.IntRange(min=0), metavar="LINES", help="Only the last lines of each replica."
)
@click.option("--since", metavar="WHEN", help="Only output since then: 10m, 1h30m, 2026-03-01T14:00.")
@shared
@click.argument("names", nargs=-1)
def logs(target: Target, follow: bool, tail: int | None, since: str | None, names: tuple[str, ...]) -> None:
    """Print the output of replicas. Lines of several replicas are in order of time and marked with the replica."""
    import time

    from launcher.status.output import print_logs
    from starling.core.units import parse_since

    moment = None if since is None else parse_since(since, time.time())
    print_logs(target.open_engine(), names, follow=follow, tail=tail, since=moment)
