"""Convert label formats of public datasets to one text file per image: `class x y width height`, 0 to 1.

Each converter works inside one dataset's folder and only adds files: images and annotations are not changed.
"""

from __future__ import annotations

import ast
import csv
import errno
import io
import math
import os
import re
import shutil
import uuid
import xml.etree.ElementTree as ElementTree
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from starling.core.budget import Budget, BudgetExceeded
from starling.core.errors import DataError, suggest
from starling.core.files.refusals import refusal
from starling.core.files.regular import is_file, open_regular, read_regular
from starling.core.utf8 import HEAD_BYTES, NotUtf8, check_utf8
from starling.core.words import printable
from starling.data.fetch.annotation_files import members

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels, measured from the image's top left corner."""
Row = tuple[int, Box]
"""Class number and box."""

_MAX_XML_BYTES = 4 << 20
_MAX_CLASS_FILE_BYTES = 4 << 20
_MAX_LINES_BYTES = 16 << 20
"""Maximum size of a list of names, or of one image's annotations in lines."""
_MAX_CSV_LINE = 1 << 20
_MAX_BOXES = 20_000_000
"""Maximum number of boxes in one file of annotations; the largest public set has 15 million."""
_MAX_SIDE = 1 << 20
"""Maximum side in pixels of an annotated image; the reader of images allows far less."""
_OPEN_IMAGES_COLUMNS = ("ImageID", "LabelName", "XMin", "YMin", "XMax", "YMax", "IsGroupOf")
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
_NO_HARD_LINKS = frozenset(
    {errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES}
)
_BEYOND_EDGE = 0.01
"""Fraction of an image by which a corner may lie outside, for rounding; a corner further out is in other units."""


class Converted(NamedTuple):
    """The result of a converter that may leave something out."""

    images: int
    remark: str
    """What was left out, and why; empty if nothing was left out."""


def convert_voc(root: Path, names: Sequence[str], *, source: str, split: str, into: str) -> int:
    """Convert the images in one split's list of a Pascal VOC folder, and return their number.

    `source` holds JPEGImages, Annotations and ImageSets/Main; the images appear in `images/<into>` as hard links
    or copies, the labels in `labels/<into>`. Objects marked as difficult are left
    out, as in the challenge's own scores. Corners count from 1 and are inclusive (VOC2012 development kit, 2.3).
    """
    folder = root / source
    stems = _lines(folder / "ImageSets" / "Main" / f"{split}.txt")
    for stem in stems:
        image = below(folder, f"JPEGImages/{stem}.jpg")
        rows, width, height = read_voc(below(folder, f"Annotations/{stem}.xml"), names)
        target = root / "images" / into / image.name
        _link(image, target)
        write_labels(target, rows, width, height)
    return len(stems)


def read_voc(path: Path, names: Sequence[str]) -> tuple[list[Row], int, int]:
    """Return the rows of a VOC annotation, and the image's width and height."""
    content = read_bounded(path, _MAX_XML_BYTES)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    # Parsed from text, so that the file cannot choose an encoding that hides its entities from the next check.
    if "\0" in text or "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise DataError(f"{path}: declares entities, which no annotation needs; refused")
    rows: list[Row] = []
    try:
        tree = ElementTree.fromstring(text)
        width, height = (int(_text(tree, f"size/{side}")) for side in ("width", "height"))
        for item in tree.iter("object"):
            if (item.findtext("difficult") or "0").strip() == "1":
                continue
            left, top, right, bottom = (
                float(_text(item, f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax")
            )
            rows.append((class_of(path, _text(item, "name"), names), (left - 1, top - 1, right, bottom)))
    except (ElementTree.ParseError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: not a VOC annotation: {error}; fetch the dataset again") from None
    return rows, width, height


def convert_visdrone(root: Path, names: Sequence[str], *, source: str) -> int:
    """Write `<source>/labels` for a VisDrone-DET folder of images and annotations; return the number of images.

    An annotation row is left, top, width, height, score, category, truncation, occlusion. Rows of score 0 and
    category 0 (regions to ignore) and category 11 (others) are left out; categories 1 to 10 become 0 to 9.
    """
    annotations = sorted((root / source / "annotations").glob("*.txt"))
    if not annotations:
        raise DataError(f"{root / source}: no annotations/*.txt there; fetch the dataset again")
    for path in annotations:
        rows: list[Row] = []
        for number, line in enumerate(_lines(path), start=1):
            try:
                left, top, width, height, score, category = (int(v) for v in line.rstrip(",").split(",")[:6])
            except ValueError:
                raise DataError(f"{path}:{number}: not a VisDrone row: {line[:60]!r}") from None
            if score and 1 <= category <= len(names):
                rows.append((category - 1, (left, top, left + width, top + height)))
        image = root / source / "images" / f"{path.stem}.jpg"
        write_labels(image, rows, *size_of(image))
    return len(annotations)


def convert_wheat(root: Path, names: Sequence[str], *, source: str, images: str) -> int:
    """Convert a Global Wheat CSV for the images in `images`, and return the number of images in the CSV.

    Two layouts: `image_name,BoxesString,domain`, corners of boxes separated by `;` (GWHD 2021), and a row per box with
    `image_id,width,height,bbox,source`, bbox as `[left, top, width, height]` (GWHD 2020).
    """
    boxes: dict[str, list[Box]] = defaultdict(list)
    path = below(root, source)
    try:
        budget = Budget(seconds=math.inf, boxes=_MAX_BOXES // 10)
        for number, row in enumerate(csv.DictReader(_csv_lines(path)), start=2):
            try:
                name, some = _wheat_boxes(row)
            except (
                KeyError,
                ValueError,
                SyntaxError,
                TypeError,
                AttributeError,
                RecursionError,
                MemoryError,
            ):
                raise DataError(f"{path}:{number}: not a row of a Global Wheat CSV; check the file") from None
            budget.spend(boxes=1 + len(some))
            boxes[name].extend(some)
    except (OSError, UnicodeDecodeError, csv.Error, BudgetExceeded) as error:
        raise DataError(f"{path}: cannot be read as CSV: {error}; check the file") from None
    for name, some in boxes.items():
        image = below(root, f"{images}/{name}")
        write_labels(image, [(0, box) for box in some], *size_of(image))
    return len(boxes)


def _wheat_boxes(row: Mapping[str, str]) -> tuple[str, list[Box]]:
    if "BoxesString" in row:
        texts = [text for text in row["BoxesString"].split(";") if text.strip() and text.strip() != "no_box"]
        return row["image_name"], [four_numbers(text.split()) for text in texts]
    left, top, width, height = four_numbers(ast.literal_eval(row["bbox"]))
    name = row["image_id"]
    return (name if PurePosixPath(name).suffix else f"{name}.jpg"), [(left, top, left + width, top + height)]


def convert_coco(root: Path, names: Sequence[str], *, source: str, images: str) -> int:
    """Convert a COCO-style JSON (`instances_*.json`) for the images in `images`; return its number of images.

    Categories become classes in the order of their ids, and must have the names of the description's classes. Crowd
    regions are left out. Source: cocodataset.org, data format, object detection.
    """
    path = below(root, source)
    try:
        categories, entries, boxes = _read_coco(path)
        categories.sort()
        _check_names(path, [name for _, name in categories], names)
        classes = {identity: number for number, (identity, _) in enumerate(categories)}
        for identity, name, width, height in entries:
            rows = (
                (classes[int(values[0])], four_numbers(values[1:])) for values in _fives(boxes.get(identity))
            )
            write_labels(below(root, f"{images}/{name}"), rows, width, height)
        return len(entries)
    except NotUtf8 as error:
        raise DataError(f"{path}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, BudgetExceeded) as error:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise
        raise DataError(
            f"{path}: not COCO annotations: {type(error).__name__}: {printable(str(error)[:200])}; fetch it again"
        ) from None


def _read_coco(
    path: Path,
) -> tuple[list[tuple[int, str]], list[tuple[Any, str, int, int]], dict[Any, array[float]]]:
    """Return the categories (id, name), the images (id, file name, width, height), and the boxes of each image.

    A box is five numbers: the category's id, left, top, right, bottom. The file is read piece by piece, as files of
    real datasets have up to gigabytes.
    """
    budget = Budget(seconds=math.inf, boxes=_MAX_BOXES, images=_MAX_BOXES // 10, categories=100_000)
    categories: list[tuple[int, str]] = []
    entries: list[tuple[Any, str, int, int]] = []
    boxes: dict[Any, array[float]] = defaultdict(lambda: array("d"))
    there = set()
    for key, item in members(path):
        there.add(key)
        if key == "categories":
            budget.spend(categories=1)
            categories.append((int(item["id"]), str(item["name"])))
        elif key == "images":
            budget.spend(images=1)
            entries.append((item["id"], str(item["file_name"]), int(item["width"]), int(item["height"])))
        elif key == "annotations" and not item.get("iscrowd"):
            budget.spend(boxes=1)
            left, top, width, height = four_numbers(item["bbox"])
            values = (float(int(item["category_id"])), left, top, left + width, top + height)
            boxes[item["image_id"]].extend(values)
    for key in ("categories", "images", "annotations"):
        if key not in there:
            raise KeyError(key)
    return categories, entries, boxes


def _fives(values: array[float] | None) -> Iterator[array[float]]:
    for start in range(0, len(values or ()), 5):
        assert values is not None
        yield values[start : start + 5]


def convert_open_images(
    root: Path, names: Sequence[str], *, source: str, images: str, classes: str
) -> Converted:
    """Convert an Open Images CSV of boxes, for those of its images that exist in `images` as `ImageID.jpg`.

    `classes` is the CSV of class descriptions, in the order of `names`. Boxes around a group of objects are left
    out, as crowds are. Rows are read one by one, and rows of one image need not be adjacent; the label folder appears
    only when complete. If `images` does not exist, nothing is read. Source: the data formats page of Open Images V6.
    Raises DataError, with file and line, for an impossible row.
    """
    folder = below(root, images)
    if not folder.is_dir():
        return Converted(0, f"{images} is not there, so {source} is not read")
    described = read_open_images_classes(below(root, classes))
    _check_names(root / classes, list(described.values()), names)
    numbers = {label: number for number, label in enumerate(described)}
    converted = elsewhere = 0
    apart: set[Path] = set()
    with _new_labels(folder) as labels:
        rows = _open_images_rows(below(root, source), numbers)
        for image, some in groupby(rows, key=itemgetter(0)):
            if not (folder / f"{image}.jpg").is_file():
                elsewhere += sum(1 for _ in some)
                continue
            path = labels / f"{image}.txt"
            lines = _once(path, _label_lines((row for _, row in some if row is not None), 1, 1))
            if path.exists():
                apart.add(path)
            else:
                converted += 1
            _write_lines(path, lines, "a")
        for path in apart:
            with open(path, encoding="utf-8") as file:
                lines = _once(path, map(str.rstrip, file))
            _write_lines(path, lines, "w")
        if not converted:
            raise DataError(f"{folder}: no image of {source} is there; they belong there as ImageID.jpg")
    return Converted(converted, f"{elsewhere} rows of images that are not in {images}" if elsewhere else "")


def read_open_images_classes(path: Path) -> dict[str, str]:
    """Return the class descriptions of Open Images, label -> name, in the order of the classes.

    The file has one row `/m/0k4j,Car` per class; later releases have a heading. Raises DataError for anything else.
    """
    text = read_bounded(path, _MAX_CLASS_FILE_BYTES).decode("utf-8-sig", "replace")
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        row = next(csv.reader([line]), [])
        if not row or (number == 1 and row == ["LabelName", "DisplayName"]):
            continue
        if len(row) != 2 or not row[0].startswith("/") or not row[1].strip() or row[0] in found:
            raise DataError(f"{path}:{number}: not a class description: {line[:60]!r}; fetch the file again")
        found[row[0]] = row[1].strip()
    if not found:
        raise DataError(f"{path}: describes no classes; fetch the file again")
    return found


def _open_images_rows(path: Path, numbers: Mapping[str, int]) -> Iterator[tuple[str, Row | None]]:
    """Yield image and row for each line of a CSV of boxes; the row is None for a box around a group."""
    try:
        reader = csv.reader(_csv_lines(path))
        header = next(reader, [])
        lacking = [column for column in _OPEN_IMAGES_COLUMNS if column not in header]
        if lacking:
            raise DataError(f"{path}:1: no column {', '.join(lacking)}; is it the CSV of boxes?")
        pick = itemgetter(*(header.index(column) for column in _OPEN_IMAGES_COLUMNS))
        for fields in reader:
            if not fields:
                continue
            try:
                if len(fields) != len(header):
                    raise ValueError(f"{len(fields)} columns, the heading has {len(header)}")
                row = _open_images_row(pick(fields), numbers)
            except ValueError as error:
                raise DataError(f"{path}:{reader.line_num}: {error}; fetch the file again") from None
            yield row
    except (OSError, UnicodeDecodeError, csv.Error, BudgetExceeded) as error:
        raise DataError(f"{path}: cannot be read as CSV: {error}; fetch the file again") from None


def _open_images_row(values: Sequence[str], numbers: Mapping[str, int]) -> tuple[str, Row | None]:
    """Return image and row from the values in the order of the columns. Raises ValueError with the problem."""
    image, label, *corners, group = values
    if not re.fullmatch(r"[\w-]+", image, re.ASCII):
        raise ValueError(f"{image[:40]!r} is no ImageID")
    if label not in numbers:
        raise ValueError(f"{label[:40]!r} is not among the class descriptions")
    left, top, right, bottom = box = four_numbers(corners)
    if not (
        -_BEYOND_EDGE <= left <= right <= 1 + _BEYOND_EDGE
        and -_BEYOND_EDGE <= top <= bottom <= 1 + _BEYOND_EDGE
    ):
        raise ValueError(f"{','.join(corners)[:60]} is no box of corners from 0 to 1")
    if group not in ("0", "1", "-1"):  # -1: unknown
        raise ValueError(f"IsGroupOf is {group[:40]!r}, must be 0, 1 or -1")
    return image, None if group == "1" else (numbers[label], box)


@contextmanager
def _new_labels(images: Path) -> Iterator[Path]:
    """Yield a temporary folder for the labels of the images in `images`; it is renamed when all labels are written."""
    from starling.data.dataset.labels import label_path

    target = label_path(images / "image.jpg").parent
    if target == images:
        raise DataError(f"{images}: must be below a folder named images; rename it")
    if target.exists():
        raise DataError(f"{target}: is there already; labels are never replaced: move it away first")
    building = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        building.mkdir(parents=True)
        yield building
        building.rename(target)
    except OSError as error:
        raise refusal(error, target) or DataError(
            f"{target}: cannot be written: {error.strerror}; check the owner of the folder"
        ) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_lines(path: Path, lines: Iterable[str], mode: str) -> None:
    """Write or append lines to a label file of an unfinished folder."""
    with open(path, mode, encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def _once(path: Path, lines: Iterable[str]) -> list[str]:
    """Return each line once; raises DataError for more lines than one image may have."""
    from starling.data.dataset.labels import MAX_ROWS

    once: dict[str, None] = {}
    for line in lines:
        once[line] = None
        if len(once) > MAX_ROWS:
            raise DataError(f"{path.stem}: over {MAX_ROWS} boxes in one image; fetch the annotations again")
    return list(once)


def _check_names(path: Path, found: Sequence[str], names: Sequence[str]) -> None:
    if len(found) != len(names):
        raise DataError(f"{path}: {len(found)} categories, the description has {len(names)}; make them agree")
    for number, (there, here) in enumerate(zip(found, names, strict=True)):
        if there.strip().casefold() != here.strip().casefold():
            raise DataError(
                f"{path}: class {number} is {there!r}, the description says {here!r}; make them agree"
            )


def class_of(path: Path, name: str, names: Sequence[str]) -> int:
    """Return the number of a class; raises DataError, with `path`, for a class that is not in the description."""
    try:
        return list(names).index(name)
    except ValueError:
        raise DataError(f"{path}: class {name!r} is not in the description{suggest(name, names)}") from None


def write_labels(image: Path, rows: Iterable[Row], width: int, height: int) -> None:
    """Write the label file of an image: boxes clipped to the image, without boxes that are outside or have no area."""
    if not (1 <= width <= _MAX_SIDE and 1 <= height <= _MAX_SIDE):
        raise DataError(
            f"{image}: annotated as {str(width)[:12]} × {str(height)[:12]} pixels; fetch the dataset again"
        )
    lines = dict.fromkeys(_label_lines(rows, width, height))
    from starling.data.dataset.labels import label_path  # NumPy; a host that only fetches has none

    path = label_path(image)
    # Without write_atomic: a dataset has up to millions of label files, and one rename makes the whole folder appear.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
    except FileExistsError:
        raise DataError(f"{path}: is there already; labels are never replaced: move it away first") from None
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> Exception:
    """Return the exception for a file whose name comes from an annotation; a full disk is reported by the caller."""
    if error.errno in _NO_ROOM:
        return error
    return DataError(
        f"{printable(str(path)[:300])}: cannot be written: {error.strerror}; check the annotations"
    )


def _label_lines(rows: Iterable[Row], width: int, height: int) -> Iterator[str]:
    """Yield the lines of a label file, for the boxes that have an area inside the image."""
    for number, (left, top, right, bottom) in rows:
        left, right = (min(max(x, 0.0), width) / width for x in (left, right))
        top, bottom = (min(max(y, 0.0), height) / height for y in (top, bottom))
        if right > left and bottom > top:
            values = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
            yield f"{number} " + " ".join(f"{value:.6f}" for value in values)


def size_of(image: Path) -> tuple[int, int]:
    """Return an image's width and height; raises DataError if the image cannot be used."""
    from starling.data.dataset.images import UnusableImageError, read_header  # OpenCV is slow to import

    try:
        height, width = read_header(image).hw
    except UnusableImageError as error:
        raise DataError(f"{image}: {error}; fetch the dataset again") from None
    return width, height


def _link(source: Path, target: Path) -> None:
    """Link an image to a second name, or copy it if the file system has no hard links."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target)
    except FileNotFoundError:
        raise DataError(f"{source}: is not there; fetch the dataset again") from None
    except FileExistsError:
        raise DataError(f"{target}: is there already; move it away first") from None
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS or not is_file(source):
            raise _unwritable(target, error) from None
        shutil.copyfile(source, target)


def below(root: Path, name: str) -> Path:
    """Return a path below `root`; raises DataError for a name from an annotation that leads out of `root`."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise DataError(f"{name!r} leads out of {root}; refused")
    return root / path


def four_numbers(values: Iterable[Any]) -> Box:
    """Return four finite numbers; raises ValueError for anything else."""
    left, top, right, bottom = (float(value) for value in values)
    if not all(math.isfinite(value) for value in (left, top, right, bottom)):
        raise ValueError("a box that is not finite")
    return left, top, right, bottom


def _text(element: ElementTree.Element, path: str) -> str:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"no <{path}>")
    return text.strip()


def _lines(path: Path) -> list[str]:
    text = read_bounded(path, _MAX_LINES_BYTES).decode("utf-8-sig", "replace")
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_bounded(path: Path, limit: int) -> bytes:
    """Return a file's bytes; raises DataError if the file cannot be read or has more than `limit` bytes."""
    try:
        content = read_regular(path, limit)
        check_utf8(content[:HEAD_BYTES], path)
    except NotUtf8 as error:
        raise DataError(f"{path}: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; fetch the dataset again") from None
    except BudgetExceeded as error:
        raise DataError(f"{path}: {error}, so not what it should be; fetch the dataset again") from None
    return content


def _csv_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a CSV of any length. Raises OSError, UnicodeDecodeError, and BudgetExceeded for a long line."""
    with open_regular(path) as file:
        try:
            check_utf8(file.read(HEAD_BYTES), path)
        except NotUtf8 as error:
            raise DataError(f"{path}: {error}") from None
        file.seek(0)
        text = io.TextIOWrapper(file, "utf-8-sig", newline="")
        while line := text.readline(_MAX_CSV_LINE):
            if len(line) == _MAX_CSV_LINE:
                raise BudgetExceeded(f"a line of more than {_MAX_CSV_LINE >> 20} million characters")
            yield line
