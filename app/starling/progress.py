"""Progress for people: on a terminal a line that is rewritten, in a log a whole line from time to time."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TextIO

from starling.core.files.refusals import disk_write
from starling.core.log_lines import lines_to

_CONSOLE = Path("the console")
"""The name of standard output in messages; it may be a file on a full disk."""
LINES_KEPT = 200
"""The most lines kept for the next listener while there is none."""
LOG_EVERY_S = 10.0
TERMINAL_EVERY_S = 0.2


class Progress:
    """Prints permanent and temporary lines. One object prints all lines, so lines never mix."""

    def __init__(
        self, stream: TextIO | None = None, prefix: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream or sys.stdout
        self.prefix = prefix
        self._clock = clock
        self._terminal = self._stream.isatty()
        self._shown_at = clock()
        self._width = 0
        self._listener: Callable[[str], None] | None = None
        self._kept: deque[str] = deque(maxlen=LINES_KEPT)

    @property
    def aloud(self) -> Progress:
        """What tells of work that one process does for all of its host, whichever it is."""
        return self

    def say(self, line: str) -> None:
        """Print a permanent line."""
        self._write(f"{self.prefix}{line}", end="\n")
        self._shown_at = self._clock()
        if self._listener is None:
            self._kept.append(line)
        else:
            self._listener(line)

    def listen(self, listener: Callable[[str], None] | None) -> None:
        """Call `listener` with every later line, and first with the lines kept while there was no listener."""
        self._listener = listener
        while listener is not None and self._kept:
            listener(self._kept.popleft())

    def show(self, line: Callable[[], str]) -> None:
        """Show a line that the next one replaces; in a log, print it if no line was printed for LOG_EVERY_S."""
        now = self._clock()
        if now - self._shown_at < (TERMINAL_EVERY_S if self._terminal else LOG_EVERY_S):
            return
        self._shown_at = now
        self._write(f"{self.prefix}{line()}", end="" if self._terminal else "\n")

    def _write(self, line: str, end: str) -> None:
        if self._terminal:
            padding = " " * max(self._width - len(line), 0)
            self._width = 0 if end else len(line)
            line = f"\r{line}{padding}"
        with disk_write(_CONSOLE):
            self._stream.write(line + end)
            self._stream.flush()


class Silence(Progress):
    """Prints nothing: of several processes that train together, only one prints."""

    def __init__(self, aloud: Progress | None = None) -> None:
        super().__init__()
        self._aloud = aloud or self

    @property
    def aloud(self) -> Progress:
        """What tells of work that this process does for all of its host."""
        return self._aloud

    def _write(self, line: str, end: str) -> None:
        pass

    def show(self, line: Callable[[], str]) -> None:
        """Leave the line unmade."""


_consoles: list[Progress] = []
"""Of the running command, the innermost last. `logging` has its handlers for the whole process, too."""


def console() -> Progress:
    """Return what shows the passing lines of the running command; in a program that runs none, Silence."""
    return _consoles[-1] if _consoles else Silence()


@contextmanager
def on_console(progress: Progress) -> Iterator[Progress]:
    """Run a command: meanwhile `progress` says what modules log, and is the `console`."""
    with _innermost(progress):
        if len(_consoles) > 1:  # the outer one's handler is there
            yield progress
            return
        with lines_to(lambda line: console().say(line)):
            yield progress


@contextmanager
def aloud() -> Iterator[Progress]:
    """Let each rank tell meanwhile what it does for all of its host; yield what shows its passing lines."""
    if not _consoles:
        yield console()
        return
    with _innermost(console().aloud) as progress:
        yield progress


@contextmanager
def quiet() -> Iterator[None]:
    """Let a command say nothing meanwhile: what is looked at will be looked at again, and told then."""
    with _innermost(Silence()) if _consoles else nullcontext():
        yield


@contextmanager
def _innermost(progress: Progress) -> Iterator[Progress]:
    _consoles.append(progress)
    try:
        yield progress
    finally:
        _consoles.pop()
