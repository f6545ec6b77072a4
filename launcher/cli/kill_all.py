"""`launcher kill-all`: kill and remove replicas, and nothing else."""

from __future__ import annotations

import sys

import click

from launcher.cli.context import Target, count_words, shared
from launcher.console import confirmed, say
from launcher.options.config_file import ConfiguredCommand
from starling.core.errors import UsageError


@click.command("kill-all", cls=ConfiguredCommand)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document; with --yes.")
@shared
@click.argument("names", nargs=-1)
def kill_all(target: Target, yes: bool, as_json: bool, names: tuple[str, ...]) -> None:
    """Kill and remove your replicas, and no other containers. NAMES select replicas or fleets."""
    import json

    from launcher.errors import EngineError
    from launcher.fleet.end import discard
    from launcher.status.selection import select
    from launcher.status.words import device_words, words_for

    if as_json and not yes:
        raise UsageError("--json: asks for no confirmation; give --yes")
    chosen = target.open_engine()
    states = select(chosen.list(), names)
    if not states and not as_json:
        click.echo("none: nothing to remove")
        return
    for state in () if as_json else states:
        say(f"{state.name}  {device_words(state.device)}  {words_for(state)}  {state.id[:12]}")
    if not yes and not confirmed(f"kill and remove {count_words(states)}?", "kill-all"):
        click.echo("nothing removed")
        sys.exit(1)
    failures = discard(chosen, states)
    if failures:
        raise EngineError("could not remove " + "; ".join(failures))
    if as_json:
        click.echo(json.dumps({"removed": [state.name for state in states]}, indent=2))
    else:
        click.echo(f"removed {count_words(states)}; what they wrote stays in the runs folder")
