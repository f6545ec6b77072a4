"""What format a file of annotations has, by its first and last bytes; nothing is parsed."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Literal

_SNIFFED = 64 << 10
"""Bytes at a file's beginning, and at its end, that show its format."""


def kind_of_xml(path: Path) -> Literal["voc", "cvat"] | None:
    """Return the format of an XML file of annotations."""
    text = _ends(path)
    if b"<annotations" in text and b"<image" in text:
        return "cvat"
    return "voc" if b"<annotation" in text else None


def kind_of_json(path: Path) -> Literal["coco", "labelme", "other"] | None:
    """Return the format of a JSON file of annotations; None for JSON of something else."""
    keys = set(re.findall(rb'"(\w+)"\s*:', _ends(path)))
    if (
        {b"annotations", b"images"} <= keys
        or {b"annotations", b"categories"} <= keys
        or {b"bbox", b"image_id"} <= keys
    ):
        return "coco"
    if b"shapes" in keys and {b"imagePath", b"shape_type", b"imageHeight"} & keys:
        return "labelme"
    known = {
        b"_via_img_metadata",
        b"regions",
        b"annotations",
        b"completed_by",
        b"objects",
        b"labels",
        b"boxes",
        b"bbox",
    }
    return "other" if known & keys else None


def table_columns(path: Path) -> set[str]:
    """Return the columns of a table whose heading names images and boxes; none for other tables."""
    text = _ends(path)[:_SNIFFED].decode("utf-8-sig", "replace")
    try:
        heading = next(
            csv.reader(io.StringIO(text), delimiter="\t" if "\t" in text.split("\n")[0] else ","), []
        )
    except csv.Error:
        return set()
    columns = {column.strip() for column in heading}
    words = " ".join(columns).casefold()
    names_boxes = re.search(r"x_?min|xmax|bbox|box|width|x_?center|\bx1?\b|left", words)
    return columns if names_boxes and re.search(r"image|file|img|path|name|\bid\b|patient", words) else set()


def _ends(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            head = file.read(_SNIFFED)
            size = file.seek(0, 2)
            file.seek(max(size - _SNIFFED, len(head)))
            return head + file.read(_SNIFFED)
    except OSError:
        return b""
