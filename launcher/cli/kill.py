"""`launcher kill NAMES…`: end replicas at once, and leave them listed."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

import click

from launcher.cli.context import Target, shared
from launcher.options.config_file import ConfiguredCommand

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.engines.base import Engine, ReplicaState

END_S = 10.0
"""A kernel that has not ended a killed process by then is waiting for a disk or a driver."""


@click.command(cls=ConfiguredCommand)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@shared
@click.argument("names", nargs=-1, required=True)
def kill(target: Target, as_json: bool, names: tuple[str, ...]) -> None:
    """Kill the replicas NAMES at once (SIGKILL); NAMES are replicas, or fleets as project/name.

    What they did since their last checkpoint is lost: `stop` saves first. They stay listed, and the same `up` resumes
    them. Does not ask, since you name them.
    """
    from launcher.status.selection import select
    from launcher.status.words import words_for

    chosen = target.open_engine()
    states = select(chosen.list(), names)
    ended = _end_now(chosen, states)
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


def _end_now(engine: Engine, states: Sequence[ReplicaState]) -> list[ReplicaState]:
    """Send SIGKILL to all that live, wait for their ends, and return how all of them are now."""
    from launcher.parallel import in_parallel

    for outcome in in_parallel(
        lambda state: engine.kill(state.id), [state for state in states if state.live]
    ):
        if outcome.error is not None:
            raise outcome.error
    deadline = time.monotonic() + END_S
    while True:
        found = [now for state in states if (now := engine.state(state.id)) is not None]
        if not any(state.live for state in found) or time.monotonic() > deadline:
            return found
        time.sleep(0.1)
