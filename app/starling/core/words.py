"""Make untrusted text safe for messages: short, on one line, without control characters."""

from __future__ import annotations

MOST_SHOWN = 160
"""The most characters; a name in a hostile file may be as long as the file."""


def shown(words: object, most: int = MOST_SHOWN) -> str:
    """Return the first line of `words`, with control characters as escapes, cut to `most` characters."""
    text = str(words)[: 4 * most].strip()
    line = (text.splitlines() or [""])[0]
    text = printable(line)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def printable(words: object) -> str:
    """Return `words` for any terminal and UTF-8 file: characters that are not printable become escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(words))
