"""Run one action on several replicas in parallel."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")

MOST_AT_ONCE = 16
"""The most threads, each with its own connection to the engine; an engine would serialise more requests anyway."""


class Done(Generic[Item, Value]):
    """One item's outcome: its value, or the error that its thread raised."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self.error: BaseException | None = None
        self._values: list[Value] = []

    @property
    def value(self) -> Value:
        """The value that `act` returned; raises the error that `act` raised."""
        if self.error is not None:
            raise self.error
        return self._values[0]

    def run(self, act: Callable[[Item], Value]) -> None:
        """Call `act` on the item, and keep its value or error."""
        try:
            self._values.append(act(self.item))
        except BaseException as error:
            self.error = error


def in_parallel(act: Callable[[Item], Value], items: Iterable[Item]) -> list[Done[Item, Value]]:
    """Return the outcome of `act` on every item, in the items' order; an error of one does not stop the others.

    KeyboardInterrupt is raised only after all started actions have ended, so the caller knows every outcome.
    """
    outcomes: list[Done[Item, Value]] = [Done(item) for item in items]
    if len(outcomes) == 1:
        outcomes[0].run(act)
        return outcomes
    waiting = list(reversed(outcomes))
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                mine = waiting.pop()
            except IndexError:
                return
            mine.run(act)

    threads = [threading.Thread(target=work) for _ in range(min(MOST_AT_ONCE, len(outcomes)))]
    for thread in threads:
        thread.start()
    _join(threads, stop)
    return outcomes


def _join(threads: Sequence[threading.Thread], stop: threading.Event) -> None:
    interrupted: BaseException | None = None
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except KeyboardInterrupt as error:
                interrupted = error
                stop.set()
    if interrupted is not None:
        raise interrupted
