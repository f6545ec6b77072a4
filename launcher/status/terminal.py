"""The terminal's colours and width; NO_COLOR as https://no-color.org defines it, and FORCE_COLOR."""

from __future__ import annotations

import os
import shutil
import sys

import click


def coloured() -> bool:
    """Return whether output is coloured: on a terminal unless NO_COLOR is set, and always if FORCE_COLOR is set."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "") not in ("", "0"):
        return True
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def width() -> int | None:
    """Return the terminal's columns; None in a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def paint(text: str, colour: str | None) -> str:
    """Return the text in a colour, or bold."""
    if colour is None:
        return text
    return click.style(text, bold=True) if colour == "bold" else click.style(text, fg=colour)
