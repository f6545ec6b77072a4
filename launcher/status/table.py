"""Format rows as aligned lines: complete in a pipe, fitted to the width of a terminal by leaving columns out."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.status.report import COLUMNS, Row

GAP = "  "
INDENT = "    "
STATE = COLUMNS.index("state")
STATE_WIDTH = 12
"""The width on a terminal of 120 columns; longer texts wrap."""
DISPENSABLE = tuple(
    COLUMNS.index(name)
    for name in (
        *("restarts", "CPU", "candidate", "best", "img/s"),
        *("memory", "GPU", "time left", "epoch", "device"),
    )
)
"""The columns to leave out on a narrow terminal, in this order."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the report, and its colour."""

    text: str
    colour: str | None = None


def lay_out(rows: Sequence[Row], now: float, width: int | None = None) -> list[Line]:
    """Return a heading, and at least one line per row; `width` is a terminal's, None for lines of any length."""
    cells: list[Sequence[str]] = [COLUMNS, *(row.cells(now) for row in rows)]
    if width is None:
        cells = [COLUMNS, *(_with_reason(texts, row) for texts, row in zip(cells[1:], rows, strict=True))]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    shown = list(range(len(COLUMNS)))
    if width is not None:
        shown = _fit(cells, widths, width)
    lines = [Line(_join(COLUMNS, shown, widths), "bold" if width is not None else None)]
    for row, texts in zip(rows, cells[1:], strict=True):
        lines += [Line(text, _colour(row)) for text in _wrap(texts, shown, widths)]
        if width is not None and row.reason:
            below = textwrap.wrap(row.reason, width, initial_indent=INDENT, subsequent_indent=INDENT)
            lines += [Line(text, _colour(row)) for text in below]
    return lines


def _with_reason(texts: Sequence[str], row: Row) -> tuple[str, ...]:
    state = f"{texts[STATE]}: {row.reason}" if row.reason else texts[STATE]
    return (*texts[:STATE], state, *texts[STATE + 1 :])


def _fit(cells: Sequence[Sequence[str]], widths: list[int], width: int) -> list[int]:
    """Choose the columns for a terminal, and give the remaining width to the state."""
    shown = [
        column
        for column in range(len(COLUMNS))
        if column not in DISPENSABLE or any(line[column] != "-" for line in cells[1:])
    ]
    longest = widths[STATE]
    widths[STATE] = min(longest, STATE_WIDTH)
    for dispensable in DISPENSABLE:
        if _total(shown, widths) <= width:
            break
        shown = [column for column in shown if column != dispensable]
    left = width - _total(shown, widths)
    widths[STATE] = max(min(longest, widths[STATE] + left), 8)
    return shown


def _total(shown: Sequence[int], widths: Sequence[int]) -> int:
    return sum(widths[column] for column in shown) + len(GAP) * (len(shown) - 1)


def _wrap(texts: Sequence[str], shown: Sequence[int], widths: Sequence[int]) -> list[str]:
    first, *more = textwrap.wrap(texts[STATE], widths[STATE]) or [""]
    lines = [_join([*texts[:STATE], first, *texts[STATE + 1 :]], shown, widths)]
    blank = [""] * len(texts)
    return lines + [_join([*blank[:STATE], text, *blank[STATE + 1 :]], shown, widths) for text in more]


def _join(texts: Sequence[str], shown: Sequence[int], widths: Sequence[int]) -> str:
    return GAP.join(f"{texts[column]:<{widths[column]}}" for column in shown).rstrip()


def _colour(row: Row) -> str | None:
    if row.waits:
        return "yellow"
    return None if row.state.well else "red"
