"""`launcher attach NAME`: follow one replica's output."""

from __future__ import annotations

import sys

import click

from launcher.cli.context import Target, shared
from launcher.options.config_file import ConfiguredCommand


@click.command(cls=ConfiguredCommand)
@shared
@click.argument("name")
def attach(target: Target, name: str) -> None:
    """Watch one replica's output; Ctrl-C leaves, and the replica goes on.

    Exits 0 when you leave or the replica ends well; 1 when the replica fails.
    """
    from launcher.status import output
    from launcher.status.report import exit_code
    from launcher.status.words import words_for

    chosen = target.open_engine()

    def begin() -> None:
        click.echo(f"watching {name}; Ctrl-C leaves it running", err=True)

    try:
        state = output.attach(chosen, name, begin)
    except KeyboardInterrupt:
        click.echo(f"left {name}; it goes on", err=True)
        return
    if state is not None:
        click.echo(f"{state.name}: {words_for(state)}", err=True)
        sys.exit(exit_code([state]))
