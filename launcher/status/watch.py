"""Show the status of replicas, once or repeatedly."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence

import click

from launcher.engines.base import Engine
from launcher.errors import EngineError
from launcher.status import report
from launcher.status.meter import Meter
from launcher.status.progress import told_by
from launcher.status.selection import select
from launcher.status.table import Line, lay_out
from launcher.status.terminal import coloured, paint, width


class WatchView:
    """Reads the status of the replicas that `names` select, repeatedly."""

    def __init__(self, engine: Engine, names: Sequence[str]) -> None:
        self._engine, self._names = engine, names
        self._meter = Meter(engine)
        self._begun = False

    def rows(self) -> list[report.Row]:
        """Return a row for each replica."""
        states = select(self._engine.list(), self._names)
        if not self._begun:
            self._begun = True
            self._meter.begin(states)
        # Read the reports between the two readings of figures, which uses the waiting time.
        told = told_by(self._engine, states)
        figures = self._meter.read(states)
        return [
            report.Row(state, progress, restarts, figures.get(state.id, report.Figures()))
            for state, (progress, restarts) in zip(states, told, strict=True)
        ]


def show_status(engine: Engine, names: Sequence[str], *, as_json: bool = False) -> int:
    """Print one report and return `status`'s exit code."""
    rows = WatchView(engine, names).rows()
    if as_json:
        document = {
            "replicas": [row.as_dict() for row in rows],
            "searches": [search.as_dict() for search in report.searches_of(rows)],
        }
        click.echo(json.dumps(document, indent=2))
    else:
        for line in describe(rows, width()):
            click.echo(paint(line.text, line.colour) if coloured() else line.text)
    return report.exit_code([row.state for row in rows])


def describe(rows: Sequence[report.Row], columns: int | None) -> list[Line]:
    """Return the whole report: the table, and a line per search."""
    if not rows:
        return [Line("none")]
    now = time.time()
    searches = [Line(search.words(now)) for search in report.searches_of(rows)]
    return lay_out(rows, now, columns) + searches


def watch_status(engine: Engine, names: Sequence[str], interval_s: float) -> None:
    """Show the report repeatedly until Ctrl-C; without a terminal, as complete lines.

    If the engine stops answering, the watch goes on, because the engine may restart.
    """
    view = WatchView(engine, names)
    try:
        if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            _watch_live(view, interval_s)
        while True:
            for line in _look(view, None):
                click.echo(line.text)
            sys.stdout.flush()
            time.sleep(interval_s)
    except KeyboardInterrupt:
        return


def _watch_live(view: WatchView, interval_s: float) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(no_color=not coloured(), highlight=False)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            lines = [Line(time.strftime("%H:%M:%S")), *_look(view, console.width)]
            text = Text("\n", no_wrap=True, overflow="ellipsis").join(
                Text(line.text, style=line.colour or "") for line in lines
            )
            live.update(text, refresh=True)
            time.sleep(interval_s)


def _look(view: WatchView, columns: int | None) -> list[Line]:
    try:
        return describe(view.rows(), columns)
    except EngineError as error:
        return [Line(f"{error}; asking again", "red")]
