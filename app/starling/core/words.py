"""Somebody else's words inside our messages: short, on one line, without control characters."""

from __future__ import annotations

MOST_SHOWN = 160
"""Characters; a name that a file makes up may be as long as the file."""


def shown(words: object, most: int = MOST_SHOWN) -> str:
    """Return the first line of `words`, control characters written as escapes, cut to `most` characters."""
    text = str(words)[: 4 * most].strip()
    line = (text.splitlines() or [""])[0]
    text = printable(line)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def printable(words: object) -> str:
    """Return words that any terminal and any UTF-8 file takes: what is no text, or moves a cursor, as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(words))
