"""What kind of label rows a dataset has: as its description declares, or as the rows of the whole set look."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from starling.core.errors import ConfigError
from starling.data.dataset.findings import Finding
from starling.data.dataset.labels import Keypoints, LabelFile, surrounds

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
