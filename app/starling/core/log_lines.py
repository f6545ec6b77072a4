"""What modules log is what a command says: each record's message is one line for people.

A module says something with `logging.getLogger(__name__)`; only a command shows it. A program that imports a package sees
nothing until it configures `logging` itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

PACKAGES = ("starling", "launcher")
"""The loggers above those of all modules."""

for _name in PACKAGES:
    logging.getLogger(_name).addHandler(logging.NullHandler())


class LineHandler(logging.Handler):
    """Hand on each record's message. What the receiver raises (a full disk) ends the command, as with `print`."""

    def __init__(self, receive: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._receive = receive

    def emit(self, record: logging.LogRecord) -> None:
        """Hand the message on, in the thread that logs."""
        self._receive(record.getMessage())


@contextmanager
def lines_to(receive: Callable[[str], None]) -> Iterator[None]:
    """Hand all that the modules of both packages log meanwhile to `receive`, and to no handler of the root logger."""
    handler = LineHandler(receive)
    with ExitStack() as stack:
        for name in PACKAGES:
            stack.enter_context(_handled(logging.getLogger(name), handler))
        yield


@contextmanager
def _handled(logger: logging.Logger, handler: logging.Handler) -> Iterator[None]:
    level, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a library that sets the root logger up would print each line again
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates
