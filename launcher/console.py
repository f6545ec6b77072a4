"""What a command says and asks, while it works."""

from __future__ import annotations

import os
import sys

import click

from starling.core.errors import UsageError


def say(line: str) -> None:
    """Print one line now, even into a pipe; what is being done goes on when nobody reads there any more (`| head -1`)."""
    try:
        click.echo(line)
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output()


def drop_output() -> None:
    """Let nothing more be said: also the interpreter must not try at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def confirmed(question: str, command: str) -> bool:
    """Ask, and return the answer; raises UsageError where nobody can answer. `command` is what asks."""
    try:
        return click.confirm(question)
    except click.Abort:
        raise UsageError(f"{command} asks first and nobody answers here; give --yes") from None
