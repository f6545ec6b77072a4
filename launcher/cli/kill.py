"""`launcher kill NAMES…`: kill replicas at once, and keep them listed."""

from __future__ import annotations

import json
import sys

import click

from launcher.cli.context import Target, shared
from launcher.options.config_file import ConfiguredCommand


@click.command(cls=ConfiguredCommand)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@shared
@click.argument("names", nargs=-1, required=True)
def kill(target: Target, as_json: bool, names: tuple[str, ...]) -> None:
    """Kill the replicas NAMES at once (SIGKILL); NAMES are replicas, or fleets as project/name.

    Work since a replica's last checkpoint is lost: `stop` saves first. The replicas stay listed, and the same `up`
    resumes them. `kill` does not ask, because you name the replicas.
    """
    from launcher.fleet.end import kill as kill_now
    from launcher.status.selection import select
    from launcher.status.words import words_for

    chosen = target.open_engine()
    states = select(chosen.list(), names)
    ended = kill_now(chosen, states)
    was_live = {state.id for state in states if state.live}
    if as_json:
        rows = [
            {"replica": state.name, "killed": state.id in was_live, "state": words_for(state)}
            for state in ended
        ]
        click.echo(json.dumps({"replicas": rows}, indent=2))
    else:
        for state in ended:
            click.echo(f"{state.name}: {words_for(state)}" + ("" if state.id in was_live else ", as before"))
    if any(state.live for state in ended):
        click.echo("error: not every replica has ended; `launcher status` tells which", err=True)
        sys.exit(5)
