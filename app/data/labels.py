"""Label rows: one text file a picture, one object a row, `class x y w h` or `class x1 y1 x2 y2 x3 y3 ...`.

All coordinates are parts of the picture's width and height, 0 to 1. A polygon is kept beside the box around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from app.core.budget import Budget, BudgetExceeded
from app.core.regular_file import read_regular
from app.data.findings import Finding

MAX_BYTES = 16 << 20
"""A larger file is not one picture's labels."""
MAX_LINES = 1_000_000
"""Nor is one of more lines, blank, repeated and faulty ones included."""
MAX_LINE_BYTES = 1 << 20
"""Nor is one of longer lines: a polygon of 50,000 points has less."""
MAX_ROWS = 100_000
"""Nor is one of more rows; as targets of one batch they would fill any memory."""

_MAX_NAMED = 1000
"""Faulty rows named per file; the rest are counted."""

Polygon = np.ndarray[Any, Any]
"""[k,2] float32: the corners, x and y, each 0 to 1 of a picture, or pixels where the name says so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelFile:
    """The rows of one label file."""

    rows: np.ndarray[Any, Any]
    """[n,5] float32: class, x and y of the centre, width, height, each 0 to 1. Empty for background."""
    polygons: tuple[Polygon | None, ...] = ()
    """One a row, None where the row is a box; empty where no row is a polygon."""
    problems: tuple[Finding, ...] = ()
    """Rows that cannot be true. The picture is not to be used."""
    notes: tuple[Finding, ...] = ()
    """Rows left out without harm: repetitions and boxes of no size."""
    missing: bool = False
    """Whether there is no such file."""


def label_path(image: Path) -> Path:
    """Return where the labels of `image` are: the last `images` folder replaced by `labels`, suffix `.txt`.

    A picture under no `images` folder has its labels beside it.
    """
    parts = list(image.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def read_labels(path: Path, nc: int) -> LabelFile:
    """Read one label file; a missing or empty one means a picture of background.

    `nc` is the number of classes. UTF-8 with or without a byte order mark, any line end. Never raises for
    what the file holds: faults are returned, so that the caller can collect those of a whole dataset.
    """
    try:
        content = read_regular(path, MAX_BYTES)
        _check_lines(content)
    except FileNotFoundError:
        return LabelFile(rows=np.zeros((0, 5), np.float32), missing=True)
    except BudgetExceeded as error:
        return _unusable(path, str(error), "check that it is a label file")
    except OSError as error:
        return _unusable(path, f"cannot be read: {error.strerror}", "check its permissions")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return _unusable(path, "not UTF-8 text", "check that it is a label file")
    return parse_labels(text, nc, str(path))


def _check_lines(content: bytes) -> None:
    """Raise BudgetExceeded for text whose lines would take too much time or memory."""
    if len(content) <= MAX_LINE_BYTES:
        return
    budget = Budget(lines=MAX_LINES)
    budget.spend(lines=max(content.count(b"\n"), content.count(b"\r")))
    longest = max(len(line) for line in content.replace(b"\r", b"\n").split(b"\n"))
    if longest > MAX_LINE_BYTES:
        raise BudgetExceeded(f"a line of more than {MAX_LINE_BYTES >> 20} MiB")


def parse_labels(text: str, nc: int, source: str) -> LabelFile:
    """Parse the text of a label file; `source` is its name in messages."""
    rows: dict[tuple[float, ...], int] = {}
    polygons: list[Polygon | None] = []
    problems: list[Finding] = []
    notes: list[Finding] = []
    faults = left_out = 0
    for number, line in enumerate(text.split("\n"), start=1):
        fields = line.split()
        if not fields:
            continue
        if len(rows) == MAX_ROWS:
            what = f"more than {MAX_ROWS:,} rows"
            problems.append(Finding(source, number, what, "check that it is one picture's label file"))
            break
        row = _parse_row(fields, nc)
        if isinstance(row, _Fault):
            faults += 1
            if faults <= _MAX_NAMED:
                problems.append(Finding(source, number, row.problem, row.remedy))
        elif row[3] <= 0 or row[4] <= 0 or row in rows:
            left_out += 1
            what = f"the same as line {rows[row]}" if row in rows else "a box of no size"
            if left_out <= _MAX_NAMED:
                notes.append(Finding(source, number, f"{what}, left out", "remove the row"))
        else:
            rows[row] = number
            polygons.append(_polygon(fields) if len(fields) > 5 else None)
    if faults > _MAX_NAMED:
        more = f"{faults - _MAX_NAMED} more faulty rows"
        problems.append(Finding(source, None, more, "check that it is a label file"))
    if left_out > _MAX_NAMED:
        notes.append(Finding(source, None, f"{left_out - _MAX_NAMED} more rows left out", "remove them"))
    return LabelFile(
        rows=np.array(list(rows), np.float32).reshape(-1, 5),
        polygons=tuple(polygons) if any(polygon is not None for polygon in polygons) else (),
        problems=tuple(problems),
        notes=tuple(notes),
    )


class _Fault(NamedTuple):
    problem: str
    remedy: str


def _parse_row(fields: list[str], nc: int) -> tuple[float, ...] | _Fault:
    """Return (class, x, y, w, h), or what is wrong with the row."""
    columns = len(fields)
    if columns != 5 and (columns < 7 or columns % 2 == 0):
        return _Fault(
            f"{columns} columns", "a box has 5 (class x y w h), a polygon class and 3 or more points"
        )
    try:
        values = [float(field) for field in fields]
    except ValueError:
        return _Fault(
            f"{_first_non_number(fields)!r} is not a number", "write class and coordinates as numbers"
        )
    number = values[0]
    if number < 0 or not number.is_integer():  # which NaN and infinity are not
        return _Fault(f"class {fields[0][:40]} is not a whole number from 0", "write the class's number")
    if number >= nc:
        return _Fault(
            f"class {fields[0][:40]} but the dataset has {nc} (0 to {nc - 1})",
            "fix the row or the YAML's names",
        )
    for position, value in enumerate(values[1:], start=1):
        if not 0.0 <= value <= 1.0:
            name = "xywh"[position - 1] if columns == 5 else "xy"[(position - 1) % 2]
            return _Fault(f"{name}={fields[position][:40]} outside [0,1]", "normalise it or drop the row")
    if columns == 5:
        return tuple(values)
    return number, *_box_around(values[1::2], values[2::2])


def _polygon(fields: list[str]) -> Polygon:
    return np.array([float(field) for field in fields[1:]], np.float32).reshape(-1, 2)


def _box_around(xs: list[float], ys: list[float]) -> tuple[float, float, float, float]:
    left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    return (left + right) / 2, (top + bottom) / 2, right - left, bottom - top


def _first_non_number(fields: list[str]) -> str:
    for field in fields:
        try:
            float(field)
        except ValueError:
            return field[:40]
    return ""


def _unusable(path: Path, problem: str, remedy: str) -> LabelFile:
    return LabelFile(rows=np.zeros((0, 5), np.float32), problems=(Finding(str(path), None, problem, remedy),))
