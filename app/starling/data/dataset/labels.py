"""Label rows: one text file an image, one object a row, `class x y w h` or `class x1 y1 x2 y2 x3 y3 ...`.

All coordinates are parts of the image's width and height, 0 to 1. A polygon is kept beside the box around it. Where the
dataset declares keypoints, a row is `class x y w h` and the keypoints, which a detector does not learn. Which kind of rows
a dataset has is declared by its description, or told by the rows of the whole set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from starling.core.budget import Budget, BudgetExceeded
from starling.core.errors import ConfigError
from starling.core.files.regular import read_regular
from starling.core.utf8 import NotUtf8, text_of
from starling.data.dataset.findings import Finding

MAX_BYTES = 16 << 20
"""A larger file is not one image's labels."""
MAX_LINES = 1_000_000
"""Nor is one of more lines, blank, repeated and faulty ones included."""
MAX_LINE_BYTES = 1 << 20
"""Nor is one of longer lines: a polygon of 50,000 points has less."""
MAX_ROWS = 100_000
"""Nor is one of more rows; as targets of one batch they would fill any memory."""

_MAX_NAMED = 1000
"""Faulty rows named per file; the rest are counted."""

CLIPPED_BEYOND = 0.01
"""Parts of an image by which a coordinate may lie outside [0, 1]: rounding, which is clipped. Further out is a fault."""
_LEAST_INSIDE = 0.1
"""Part of a box's side that lies, at least, between its centre and each edge of the image, where boxes share a line."""

Polygon = np.ndarray[Any, Any]
"""[k,2] float32: the corners, x and y, each 0 to 1 of an image, or pixels where the name says so."""


class Keypoints(NamedTuple):
    """The keypoints of every row, as a dataset's `kpt_shape` declares them."""

    number: int
    dimensions: int
    """2 for x and y, 3 for x, y and visibility."""

    @property
    def columns(self) -> int:
        """Columns of a row: class, box and keypoints."""
        return 5 + self.number * self.dimensions


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelFile:
    """The rows of one label file."""

    rows: np.ndarray[Any, Any]
    """[n,5] float32: class, x and y of the centre, width, height, each 0 to 1. Empty for background."""
    polygons: tuple[Polygon | None, ...] = ()
    """One a row, None where the row is a box; empty where no row is a polygon."""
    problems: tuple[Finding, ...] = ()
    """Rows that cannot be true. The image is not to be used."""
    notes: tuple[Finding, ...] = ()
    """Rows left out or clipped without harm: repetitions, boxes of no size, coordinates a little outside."""
    clipped: int = 0
    """Rows of which a coordinate was clipped."""
    left_out: int = 0
    """Rows left out without harm."""
    missing: bool = False
    """Whether there is no such file."""


def label_path(image: Path) -> Path:
    """Return where the labels of `image` are: the last `images` folder replaced by `labels`, suffix `.txt`.

    An image under no `images` folder has its labels beside it.
    """
    parts = list(image.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def label_path_beside(image: Path) -> Path:
    """Return where the labels of `image` are if they lie beside it."""
    return image.with_suffix(".txt")


def read_labels(path: Path, nc: int, keypoints: Keypoints | None = None) -> LabelFile:
    """Read one label file; a missing or empty one means an image of background.

    `nc` is the number of classes, `keypoints` what the dataset declares. UTF-8 with or without a byte order mark, any
    line end. Never raises for what the file holds: faults are returned, so that the caller can collect those of a
    whole dataset.
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
        text = text_of(content, path)
    except NotUtf8 as error:
        return _unusable(path, error.problem, f"{error.remedy}, or check that it is a label file")
    return parse_labels(text, nc, str(path), keypoints)


def _check_lines(content: bytes) -> None:
    """Raise BudgetExceeded for text whose lines would take too much time or memory."""
    if len(content) <= MAX_LINE_BYTES:
        return
    budget = Budget(lines=MAX_LINES)
    budget.spend(lines=max(content.count(b"\n"), content.count(b"\r")))
    longest = max(len(line) for line in content.replace(b"\r", b"\n").split(b"\n"))
    if longest > MAX_LINE_BYTES:
        raise BudgetExceeded(f"a line of more than {MAX_LINE_BYTES >> 20} MiB")


def parse_labels(text: str, nc: int, source: str, keypoints: Keypoints | None = None) -> LabelFile:
    """Parse the text of a label file; `source` is its name in messages."""
    rows: dict[tuple[float, ...], int] = {}
    polygons: list[Polygon | None] = []
    problems: list[Finding] = []
    notes: list[Finding] = []
    faults = left_out = clipped = 0
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1):
        fields = line.split()
        if not fields:
            continue
        if len(rows) == MAX_ROWS:
            what = f"more than {MAX_ROWS:,} rows"
            problems.append(Finding(source, number, what, "check that it is one image's label file"))
            break
        row = _parse_row(fields, nc, keypoints)
        if isinstance(row, _Fault):
            faults += 1
            if faults <= _MAX_NAMED:
                problems.append(Finding(source, number, row.problem, row.remedy))
            continue
        if row.clipped:
            clipped += 1
            if clipped <= _MAX_NAMED:
                notes.append(Finding(source, number, f"{row.clipped}, clipped", "nothing, or normalise it"))
        if row.box[3] <= 0 or row.box[4] <= 0 or row.box in rows:
            left_out += 1
            what = f"the same as line {rows[row.box]}" if row.box in rows else "a box of no size"
            if left_out <= _MAX_NAMED:
                notes.append(Finding(source, number, f"{what}, left out", "remove the row"))
        else:
            rows[row.box] = number
            polygons.append(row.polygon)
    if faults > _MAX_NAMED:
        more = f"{faults - _MAX_NAMED} more faulty rows"
        problems.append(Finding(source, None, more, "check that it is a label file"))
    for count, done, remedy in (
        (left_out, "left out", "remove them"),
        (clipped, "clipped", "normalise them"),
    ):
        if count > _MAX_NAMED:
            notes.append(Finding(source, None, f"{count - _MAX_NAMED} more rows {done}", remedy))
    return LabelFile(
        rows=np.array(list(rows), np.float32).reshape(-1, 5),
        polygons=tuple(polygons) if any(polygon is not None for polygon in polygons) else (),
        problems=tuple(problems),
        notes=tuple(notes),
        clipped=clipped,
        left_out=left_out,
    )


class _Fault(NamedTuple):
    problem: str
    remedy: str


class _Row(NamedTuple):
    box: tuple[float, ...]
    """Class, x, y, w, h."""
    polygon: Polygon | None
    clipped: str
    """The first coordinate that was clipped, in words; empty where none was."""


def _parse_row(fields: list[str], nc: int, keypoints: Keypoints | None) -> _Row | _Fault:
    """Return the row, or what is wrong with it."""
    columns = len(fields)
    try:
        values = [float(field) for field in fields]
    except ValueError:
        return _Fault(
            f"{_first_non_number(fields)!r} is not a number", "write class and coordinates as numbers"
        )
    fault = _wrong_columns(values, nc, keypoints) or _wrong_class(fields[0], values[0], nc)
    if fault is not None:
        return fault
    is_box = columns == 5 or keypoints is not None
    end, clipped = 5 if is_box else columns, ""
    for position, value in enumerate(values[1:end], start=1):
        if 0.0 <= value <= 1.0:
            continue
        name = "xywh"[position - 1] if is_box else "xy"[(position - 1) % 2]
        outside = f"{name}={fields[position][:40]} outside [0,1]"
        if not -CLIPPED_BEYOND <= value <= 1 + CLIPPED_BEYOND:
            return _Fault(outside, "normalise it or drop the row")
        values[position] = min(max(value, 0.0), 1.0)
        clipped = clipped or outside
    if is_box:
        return _Row(tuple(values[:5]), None, clipped)
    polygon = np.array(values[1:], np.float32).reshape(-1, 2)
    return _Row((values[0], *_box_around(values[1::2], values[2::2])), polygon, clipped)


def _wrong_columns(values: list[float], nc: int, keypoints: Keypoints | None) -> _Fault | None:
    """Return what is wrong with the number of columns, or with what they hold in this number."""
    columns = len(values)
    if columns == 5:
        return None
    if keypoints is not None:
        if columns == keypoints.columns:
            return None
        return _Fault(
            f"{columns} columns",
            f"with kpt_shape [{keypoints.number}, {keypoints.dimensions}] a row has {keypoints.columns} (class x y w h "
            "and the keypoints), or 5 without keypoints; fix the row or the YAML's kpt_shape",
        )
    if _looks_joined(values, nc):
        return _Fault(
            f"{columns // 5} boxes on one line",
            "write each box, class x y w h, on a line of its own; a polygon that reads so needs one point repeated",
        )
    if _looks_like_pose(values):
        count = (columns - 5) // 3
        return _Fault(
            f"{columns} columns that read as a box and {count} keypoints with visibility",
            f"write kpt_shape: [{count}, 3] into the dataset's YAML",
        )
    if columns < 7 or columns % 2 == 0:
        return _Fault(
            f"{columns} columns", "a box has 5 (class x y w h), a polygon class and 3 or more points"
        )
    return None


def _looks_joined(values: list[float], nc: int) -> bool:
    """Return whether a row reads as several boxes: each has a class, sides, and most of itself in the image.

    A polygon along the edges of its image has 0 and 1 in every fifth column too, by chance; its rest is no boxes then.
    """
    if (
        len(values) < 10
        or len(values) % 5
        or not all(_wrong_class("", one, nc) is None for one in values[::5])
    ):
        return False
    boxes = (values[start + 1 : start + 5] for start in range(0, len(values), 5))
    return all(
        min(w, h) > 0 and min(x, 1 - x) >= w * _LEAST_INSIDE and min(y, 1 - y) >= h * _LEAST_INSIDE
        for x, y, w, h in boxes
    )


def _looks_like_pose(values: list[float]) -> bool:
    """Return whether a row that no polygon can be, or hardly any, reads as class, box, and points with visibility."""
    columns = len(values)
    if columns < 8 or (columns - 5) % 3 or not all(value in (0, 1, 2) for value in values[7::3]):
        return False
    seen = [(x, y) for x, y, v in zip(values[5::3], values[6::3], values[7::3], strict=True) if v or x or y]
    return columns % 2 == 0 or 2 in values[7::3] or surrounds(values[1:5], seen)


def surrounds(box_xywhn: Sequence[float], points: Iterable[Sequence[float]]) -> bool:
    """Return whether a box lies in the image and around points, with the tolerance that hand-drawn ones need."""
    x, y, w, h = box_xywhn
    left, right, top, bottom = x - w / 2, x + w / 2, y - h / 2, y + h / 2
    if min(w, h) <= 0 or min(left, top) < -CLIPPED_BEYOND or max(right, bottom) > 1 + CLIPPED_BEYOND:
        return False
    slack_x, slack_y = w / 10, h / 10
    return all(
        left - slack_x <= px <= right + slack_x and top - slack_y <= py <= bottom + slack_y
        for px, py in points
    )


def _wrong_class(field: str, number: float, nc: int) -> _Fault | None:
    if number < 0 or not number.is_integer():  # which NaN and infinity are not
        return _Fault(f"class {field[:40]} is not a whole number from 0", "write the class's number")
    if number >= nc:
        return _Fault(
            f"class {field[:40]} but the dataset has {nc} (0 to {nc - 1})",
            "fix the row or the YAML's names",
        )
    return None


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


_MOST_KEYPOINTS = 1000
_QUADRILATERAL = 4
"""Points of an oriented box, which is as common as keypoints are."""


def read_keypoints(path: Path, mapping: Mapping[str, Any]) -> Keypoints | None:
    """Return what `kpt_shape:` of a description declares; None where it has none.

    `flip_idx:`, which says what keypoints become in a mirror, is checked and not used. Raises ConfigError.
    """
    shape, mirrored = mapping.get("kpt_shape"), mapping.get("flip_idx")
    if shape is None:
        if mirrored is not None:
            raise ConfigError(
                f"{path}: flip_idx", mirrored, "needs `kpt_shape: [keypoints, 2 or 3]` beside it"
            )
        return None
    if (
        not _whole_numbers(shape)
        or len(shape) != 2
        or not 1 <= shape[0] <= _MOST_KEYPOINTS
        or shape[1] not in (2, 3)
    ):
        raise ConfigError(
            f"{path}: kpt_shape",
            shape,
            "must be [keypoints, 2] for x and y, or [keypoints, 3] with visibility",
        )
    if mirrored is not None and (not _whole_numbers(mirrored) or sorted(mirrored) != list(range(shape[0]))):
        raise ConfigError(
            f"{path}: flip_idx", mirrored, f"must be the numbers 0 to {shape[0] - 1} of kpt_shape, each once"
        )
    return Keypoints(*shape)


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)


def doubtful_polygons(path_yaml: Path, files: Iterable[LabelFile]) -> list[Finding]:
    """Return a finding where all rows of a set may be boxes with keypoints of x and y, which nothing declares.

    One such row cannot be told from a polygon. Where each row of the set has the same number of points, and the first
    two read as a box around the others, the user is asked.
    """
    points = rows = 0
    for file in files:
        if len(file.polygons) != len(file.rows):
            return []
        for polygon in file.polygons:
            if polygon is None or len(polygon) == _QUADRILATERAL:
                return []
            points, rows = points or len(polygon), rows + 1
            if len(polygon) != points or not surrounds(
                polygon[:2].reshape(-1).tolist(), polygon[2:].tolist()
            ):
                return []
    if not rows:
        return []
    problem = (
        f"all {rows} label rows have {1 + 2 * points} columns and are read as polygons of {points} points"
    )
    remedy = (
        f"if they are boxes with {points - 2} keypoints, write kpt_shape: [{points - 2}, 2] into the YAML"
    )
    return [Finding(str(path_yaml), None, problem, remedy)]
