"""What a user looks at while replicas work: their status, and their output."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence

import click

from launcher import fleet, report
from launcher.engines.base import Engine, ReplicaState
from launcher.errors import LauncherError, UsageError
from launcher.progress import progress_of


def read_rows(engine: Engine, names: Sequence[str]) -> list[report.Row]:
    """Return what is known of the replicas that `names` mean."""
    states = fleet.select(engine.list(), names)
    return [report.Row(state, progress_of(engine, state)) for state in states]


def show_status(engine: Engine, names: Sequence[str], *, as_json: bool = False) -> int:
    """Print one report and return `status`'s exit code."""
    rows = read_rows(engine, names)
    if as_json:
        document = {
            "replicas": [row.as_dict() for row in rows],
            "searches": [search.as_dict() for search in report.searches_of(rows)],
        }
        click.echo(json.dumps(document, indent=2))
    elif not rows:
        click.echo("none")
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(report.as_table(rows))
        _say_searches(rows)
    else:
        click.echo("\n".join(report.as_lines(rows)))
        _say_searches(rows)
    return report.exit_code([row.state for row in rows])


def _say_searches(rows: Sequence[report.Row]) -> None:
    for search in report.searches_of(rows):
        click.echo(search.words(time.time()))


def watch_status(engine: Engine, names: Sequence[str], interval_s: float) -> None:
    """Show the report again and again until Ctrl-C; without a terminal, as whole lines."""
    try:
        if not sys.stdout.isatty():
            while True:
                show_status(engine, names)
                sys.stdout.flush()
                time.sleep(interval_s)
        from rich.console import Group
        from rich.live import Live
        from rich.text import Text

        with Live(auto_refresh=False, screen=False) as live:
            while True:
                rows = read_rows(engine, names)
                title = time.strftime("%H:%M:%S") + ("" if rows else "  none")
                searches = [Text(search.words(time.time())) for search in report.searches_of(rows)]
                live.update(Group(report.as_table(rows, title), *searches), refresh=True)
                time.sleep(interval_s)
    except KeyboardInterrupt:
        return


def print_logs(
    open_engine: Callable[[], Engine],
    names: Sequence[str],
    *,
    follow: bool,
    tail: int | None,
    single: bool = False,
) -> None:
    """Print the replicas' output; with `follow`, of all at once, each read by an engine client of its own.

    Raises UsageError when there is no replica, or, for `single`, when the name means several.
    """
    engine = open_engine()
    states = fleet.select(engine.list(), names)
    if not states:
        raise UsageError("none: no replica has any output; start some with `launcher up`")
    if single and len(states) > 1:
        raise UsageError(
            f"{names[0]}: names {len(states)} replicas; attach to one, or use `launcher logs -f`"
        )
    if len(states) == 1:
        for line in engine.logs(states[0].id, follow=follow, tail=tail):
            _print(line)
    elif not follow:
        for state in states:
            _copy(engine, state, False, tail)
    else:
        _follow_all(open_engine, states, tail)


def _follow_all(open_engine: Callable[[], Engine], states: Sequence[ReplicaState], tail: int | None) -> None:
    # Daemon threads: Ctrl-C must not wait for a replica to say something.
    threads = [
        threading.Thread(target=_copy, args=(open_engine(), state, True, tail), daemon=True)
        for state in states
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for thread in threads:
            thread.join(timeout=0.1)


def _copy(engine: Engine, state: ReplicaState, follow: bool, tail: int | None) -> None:
    try:
        for line in engine.logs(state.id, follow=follow, tail=tail):
            _print(f"{state.name} | {line}")
    except LauncherError as error:
        click.echo(f"{state.name} | {error}", err=True)


def _print(line: str) -> None:
    """Write the line in one piece, so that lines of several replicas never mix."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
