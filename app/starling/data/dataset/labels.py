"""Label rows: one text file per image, one object per row, `class x y w h` or `class x1 y1 x2 y2 x3 y3 ...`.

All coordinates are fractions of the image's width and height, 0 to 1. A polygon is kept together with the box around
it. If the dataset declares keypoints, a row is `class x y w h` and the keypoints, which a detector does not learn. The
description declares the kind of rows of a dataset; otherwise the rows of the whole set show it.
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
"""Maximum size of a label file in bytes."""
MAX_LINES = 1_000_000
"""Maximum number of lines of a label file; blank, repeated and faulty lines count."""
MAX_LINE_BYTES = 1 << 20
"""Maximum bytes of a line; a polygon of 50,000 points needs fewer."""
MAX_ROWS = 100_000
"""Maximum number of rows of a label file; more rows, as targets of one batch, would exhaust any memory."""

_MAX_NAMED = 1000
"""Maximum number of faulty rows named per file; further rows are only counted."""

CLIPPED_BEYOND = 0.01
"""Fraction of the image by which a coordinate may lie outside [0, 1]: a rounding error, clipped. More is a fault."""
_LEAST_INSIDE = 0.1
"""Minimum distance of a box's centre from each image edge, as a fraction of the box's side, in `_looks_joined`."""

Polygon = np.ndarray[Any, Any]
"""[k,2] float32: x and y of the corners, fractions of the image from 0 to 1, or in pixels if a docstring says so."""


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
    """One polygon per row, None if the row is a box; empty if no row is a polygon."""
    problems: tuple[Finding, ...] = ()
    """Rows with impossible values. The image must not be used."""
    notes: tuple[Finding, ...] = ()
    """Rows left out or clipped without harm: repetitions, boxes of no size, coordinates slightly outside the image."""
    clipped: int = 0
    """Number of rows with a clipped coordinate."""
    left_out: int = 0
    """Number of rows left out without harm."""
    missing: bool = False
    """Whether the file does not exist."""


def label_path(image: Path) -> Path:
    """Return the label file of `image`: the last `images` folder replaced by `labels`, suffix `.txt`.

    Without an `images` folder in the path, the label file lies beside the image.
    """
    parts = list(image.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def label_path_beside(image: Path) -> Path:
    """Return the label file of `image` if labels lie beside the image."""
    return image.with_suffix(".txt")


def read_labels(path: Path, nc: int, keypoints: Keypoints | None = None) -> LabelFile:
    """Read one label file; a missing or empty one means an image of background.

    `nc` is the number of classes, `keypoints` the declaration of the dataset. UTF-8 with or without a byte order mark,
    any line end. Never raises for the content of the file: faults are returned, so that the caller can collect the
    faults of a whole dataset.
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
    """Raise BudgetExceeded for text whose lines would take too much time or memory to parse."""
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
    """Description of the first clipped coordinate; empty if none was clipped."""


def _parse_row(fields: list[str], nc: int, keypoints: Keypoints | None) -> _Row | _Fault:
    """Return the row, or the fault in it."""
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
    """Return the fault in the number of columns, or in the values for this number of columns."""
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
            "write each box, class x y w h, on a line of its own; if the row is a polygon, repeat one of its points",
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
    """Return whether a row reads as several boxes: each with a class, a size, and its centre well inside the image.

    A polygon along the image edges may also have 0 and 1 in every fifth column, but its other columns are no boxes.
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
    """Return whether a row that is hardly a polygon reads as class, box, and keypoints with visibility."""
    columns = len(values)
    if columns < 8 or (columns - 5) % 3 or not all(value in (0, 1, 2) for value in values[7::3]):
        return False
    seen = [(x, y) for x, y, v in zip(values[5::3], values[6::3], values[7::3], strict=True) if v or x or y]
    return columns % 2 == 0 or 2 in values[7::3] or surrounds(values[1:5], seen)


def surrounds(box_xywhn: Sequence[float], points: Iterable[Sequence[float]]) -> bool:
    """Return whether a box lies in the image and around the points, with a tolerance for hand-drawn boxes."""
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
    if number < 0 or not number.is_integer():  # NaN and infinity are not integers either
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
"""Points of an oriented box; oriented boxes are as common as keypoints."""


def read_keypoints(path: Path, mapping: Mapping[str, Any]) -> Keypoints | None:
    """Return the keypoints that `kpt_shape:` of a description declares; None without `kpt_shape:`.

    `flip_idx:`, the order of keypoints after a mirroring, is checked and not used. Raises ConfigError.
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
    """Return a finding if all rows of a set may be boxes with undeclared keypoints of x and y.

    One such row cannot be distinguished from a polygon. If all rows of the set have the same number of points, and the
    first two pairs read as a box around the other points, the finding asks the user.
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
