"""The messages and questions of a running command."""

from __future__ import annotations

import os
import sys

import click

from starling.core.errors import UsageError


def say(line: str) -> None:
    """Print one line now, even into a pipe; if the reader has closed the pipe (`| head -1`), the command goes on."""
    try:
        click.echo(line)
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output()


def drop_output() -> None:
    """Send all further output to /dev/null, including what the interpreter flushes at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def confirmed(question: str, command: str) -> bool:
    """Ask, and return the answer; raises UsageError if nobody can answer. `command` names the asking command."""
    try:
        return click.confirm(question)
    except click.Abort:
        raise UsageError(f"{command}: nobody can answer its question here; give --yes") from None
