"""Print the output of replicas: of one unchanged; of several in order of time, with the name before each line."""

from __future__ import annotations

import heapq
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import click

from launcher.engines.base import Engine, LogLine, ReplicaState
from launcher.status.selection import select
from launcher.status.terminal import coloured, paint
from starling.core.errors import StarlingError, UsageError

PALETTE = ("cyan", "yellow", "green", "magenta", "blue", "bright_cyan", "bright_yellow", "bright_green")


def choose(engine: Engine, names: Sequence[str]) -> list[ReplicaState]:
    """Return the replicas that `names` select; raises UsageError if there are none."""
    states = select(engine.list(), names)
    if not states:
        raise UsageError("none: no replica has any output; start some with `launcher up`")
    return states


def print_logs(
    engine: Engine,
    names: Sequence[str],
    *,
    follow: bool = False,
    tail: int | None = None,
    since: float | None = None,
) -> None:
    """Print the replicas' output; with `follow`, print lines of all replicas as they arrive."""
    states = choose(engine, names)
    if len(states) == 1:
        for line in engine.logs(states[0].id, follow=follow, tail=tail, since=since):
            _print(line)
        return
    prefixes = _prefixes(states)
    if follow:
        _follow_all(engine, states, prefixes, tail, since)
        return
    streams = [
        _stamped(engine.logs(state.id, tail=tail, since=since), prefixes[state.id]) for state in states
    ]
    for _, prefix, line in heapq.merge(*streams, key=lambda item: item[0]):
        _print(prefix + line)


def attach(engine: Engine, name: str, begin: Callable[[], None] = lambda: None) -> ReplicaState | None:
    """Print one replica's output until its end or Ctrl-C; return its state then. Calls `begin` if the replica is live.

    Raises UsageError if the name selects no replica, or several.
    """
    states = choose(engine, (name,))
    if len(states) > 1:
        raise UsageError(f"{name}: names {len(states)} replicas; attach to one, or use `launcher logs -f`")
    if states[0].live:
        begin()
    for line in engine.logs(states[0].id, follow=True, tail=10):
        _print(line)
    return engine.state(states[0].id)


def _stamped(lines: Iterator[LogLine], prefix: str) -> Iterator[tuple[float, str, LogLine]]:
    """Yield (time, prefix, line); a line without a time gets the time of the line before."""
    at = 0.0
    for line in lines:
        at = at if line.at is None else line.at
        yield at, prefix, line


def _prefixes(states: Sequence[ReplicaState]) -> dict[str, str]:
    widest = max(len(state.name) for state in states)
    prefixes = {}
    for number, state in enumerate(states):
        text = f"{state.name:<{widest}} | "
        prefixes[state.id] = paint(text, PALETTE[number % len(PALETTE)]) if coloured() else text
    return prefixes


def _follow_all(
    engine: Engine,
    states: Sequence[ReplicaState],
    prefixes: dict[str, str],
    tail: int | None,
    since: float | None,
) -> None:
    reader_left = threading.Event()

    def copy(state: ReplicaState) -> None:
        try:
            for line in engine.logs(state.id, follow=True, tail=tail, since=since):
                _print(prefixes[state.id] + line)
        except BrokenPipeError:
            reader_left.set()
        except StarlingError as error:
            click.echo(f"{prefixes[state.id]}{error}", err=True)

    # Daemon threads: Ctrl-C must not wait for a replica's next line.
    threads = [threading.Thread(target=copy, args=(state,), daemon=True) for state in states]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for thread in threads:
            thread.join(timeout=0.1)
        if reader_left.is_set():
            raise BrokenPipeError


def _print(line: str) -> None:
    """Write the line with one call, which keeps lines of several replicas apart."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
