"""Annotation formats with one file per image, Pascal VOC's XML and labelme's JSON, converted to label files."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from starling.core.errors import DataError
from starling.core.files.kinds import IMAGE_SUFFIXES, is_hidden, suffix_of
from starling.core.plain_json import parse_json
from starling.data.fetch.convert import (
    Box,
    Converted,
    Row,
    below,
    class_of,
    four_numbers,
    read_bounded,
    read_voc,
    size_of,
    write_labels,
)

_MAX_JSON_BYTES = 256 << 20
"""A labelme file also contains the image itself."""
_WITHOUT_AREA = frozenset(("point", "points", "line", "linestrip"))

_Read = Callable[[Path, Sequence[str]], tuple[list[Row], int, int]]


def convert_voc_files(root: Path, names: Sequence[str], *, source: str, images: str) -> Converted:
    """Convert the VOC XML files in `source` for the images of the same names in `images`.

    Unlike `convert_voc`, no list of a split is needed, and the images stay in place. Difficult objects are left
    out.
    """
    return _convert_each(root, names, source, images, ".xml", read_voc)


def convert_labelme(root: Path, names: Sequence[str], *, source: str, images: str) -> Converted:
    """Convert the labelme JSON files in `source` for the images of the same names in `images`.

    A shape becomes the box around the shape; points and lines have no area and are left out.
    """
    return _convert_each(root, names, source, images, ".json", _labelme_rows)


def _convert_each(
    root: Path, names: Sequence[str], source: str, images: str, suffix: str, read: _Read
) -> Converted:
    folder, by_stem = below(root, source), _by_stem(below(root, images))
    files = [name for name in _listed(folder) if suffix_of(name) == suffix]
    if not files:
        raise DataError(f"{folder}: no {suffix} files there; name the folder of annotations as `source`")
    done = 0
    for name in files:
        image = by_stem.get(os.path.splitext(name)[0])
        if image is None:
            continue
        rows, width, height = read(folder / name, names)
        if width < 1 or height < 1:
            width, height = size_of(image)
        write_labels(image, rows, width, height)
        done += 1
    if not done:
        raise DataError(
            f"{folder}: no annotation has the name of an image in {root / images}; check both folders"
        )
    lone = len(files) - done
    return Converted(done, f"{lone} annotations of images that are not in {images}" if lone else "")


def _labelme_rows(path: Path, names: Sequence[str]) -> tuple[list[Row], int, int]:
    """Return the rows of a labelme file, and the image's width and height."""
    rows: list[Row] = []
    try:
        content = parse_json(read_bounded(path, _MAX_JSON_BYTES))
        for shape in content["shapes"]:
            if shape.get("shape_type", "polygon") not in _WITHOUT_AREA:
                rows.append((class_of(path, str(shape["label"]), names), _around(shape)))
        return rows, int(content.get("imageWidth") or 0), int(content.get("imageHeight") or 0)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{path}: not a labelme file: {type(error).__name__}: {error}; export it again"
        ) from None


def _around(shape: dict[str, Any]) -> Box:
    """Return the box around a shape; the points of a circle are its centre and one point on its edge."""
    points = [(float(x), float(y)) for x, y in shape["points"]]
    if shape.get("shape_type") == "circle":
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        return four_numbers((x - radius, y - radius, x + radius, y + radius))
    xs, ys = zip(*points, strict=True)
    return four_numbers((min(xs), min(ys), max(xs), max(ys)))


def _by_stem(folder: Path) -> dict[str, Path]:
    return {
        os.path.splitext(name)[0]: folder / name
        for name in _listed(folder)
        if suffix_of(name) in IMAGE_SUFFIXES
    }


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not is_hidden(name))
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error.strerror}; check the path") from None
