"""Whatever stands in label files, lists, CSVs and annotations, one message comes out, soon and in little memory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from starling.core.errors import DataError, StarlingError, UsageError
from starling.data.dataset.image_lists import find_images
from starling.data.dataset.labels import read_labels
from starling.data.fetch.annotation_files import members
from starling.data.fetch.converters import CONVERTERS
from starling.data.sources.sources import find_sources
from starling.plots.results import read_results
from starling.search.importing import read_evolve_csv
from tests.security.conftest import Measured

LONG = "n" * 300
DIGITS = "9" * 5000

LABELS = {
    "a row of columns": (lambda: "0 " * 8_000_000, "a line of more than 1 MiB"),
    "blank lines": (lambda: "\n" * 3_000_000, "1,000,000 lines"),
    "lone returns": (lambda: "\r" * 3_000_000, "1,000,000 lines"),
    "repeated rows": (lambda: "0 .5 .5 .1 .1\n" * 1_100_000, "1,000,000 lines"),
    "faulty rows": (lambda: "x y\n" * 900_000, "not a number|columns"),
    "more bytes": (lambda: "0 .5 .5 .1 .1\n" * 2_000_000, "more than 16 MiB"),
    "digits": (lambda: f"{DIGITS} .5 .5 .1 .1\n", "class"),
    "infinite": (lambda: "1e999 .5 .5 .1 .1\nnan 1 1 1 1\n", "class"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_a_hostile_label_file_is_a_finding(tmp_path: Path, kind: str) -> None:
    import re

    build, words = LABELS[kind]
    (tmp_path / "a.txt").write_text(build())
    found = read_labels(tmp_path / "a.txt", 80)
    assert found.problems
    assert re.search(words, str(found.problems[0]))


def test_hostile_label_files_take_little_time_and_memory(tmp_path: Path, measured: Measured) -> None:
    for number, (build, _) in enumerate(LABELS.values()):
        (tmp_path / f"{number}.txt").write_text(build())
    (tmp_path / "polygons.txt").write_text(("0 " + "0.1 0.9 " * 60_000 + "\n") * 30)
    setup = "from starling.data.dataset.labels import read_labels\ndef read(path):\n    read_labels(path, 80)"
    measured(setup, sorted(tmp_path.glob("*.txt")), most_bytes=600 << 20)


def odd_paths(folder: Path, suffix: str) -> list[Path]:
    """Return paths where something else than a plain file is, or nothing can be."""
    fifo, zero = folder / f"fifo{suffix}", folder / f"zero{suffix}"
    if not fifo.exists():
        os.mkfifo(fifo)
        zero.symlink_to("/dev/zero")
    return [
        fifo,
        zero,
        folder / f"{LONG}{suffix}",
        Path(f"{folder}/a\0b{suffix}"),
        Path(f"{folder}/\ud800{suffix}"),
    ]


def test_no_reader_hangs_on_a_device_or_stumbles_over_a_name(tmp_path: Path) -> None:
    for path in odd_paths(tmp_path, ".txt"):
        assert read_labels(path, 1).problems
        with pytest.raises(DataError):
            find_images([path], tmp_path, "data.yaml: train")
        with pytest.raises(DataError):
            find_sources(str(path))
        with pytest.raises(DataError):
            read_results(path)
        with pytest.raises(UsageError):
            read_evolve_csv(path)


def test_a_list_whose_entries_no_file_system_takes_is_named_by_its_first_line(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{LONG}.jpg\n../{LONG}/{LONG}.png\na.jpg\n")
    with pytest.raises(DataError, match=r"list\.txt:1: 3 of 3 entries are not there"):
        find_images([tmp_path / "list.txt"], tmp_path, "train")
    with pytest.raises(DataError, match=r"list\.txt:1"):
        find_sources(str(tmp_path / "list.txt"))


def test_a_list_of_one_endless_line_is_no_list(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"a" * 100_000)
    with pytest.raises(DataError, match="more than 16,384 characters"):
        find_images([tmp_path / "list.txt"], tmp_path, "train")


def coco(**changes: object) -> str:
    whole = {
        "categories": [{"id": 1, "name": "a"}],
        "images": [{"id": 1, "file_name": "a.jpg", "width": 10, "height": 10}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}],
    }
    return json.dumps({**whole, **changes})


def voc(body: str) -> str:
    return f"<annotation><size><width>9</width><height>9</height></size>{body}</annotation>"


def box(edge: str, name: str = "a") -> str:
    edges = "".join(f"<{e}>{edge}</{e}>" for e in ("xmin", "ymin", "xmax", "ymax"))
    return f"<object><name>{name}</name><bndbox>{edges}</bndbox></object>"


DOCTYPE = '<?xml version="1.0" encoding="{}"?><!DOCTYPE a [<!ENTITY b "bbbb">]><annotation>&b;</annotation>'

ANNOTATIONS: dict[str, tuple[str, bytes]] = {
    "coco nested": ("coco", b'{"a":' + b"[" * 200_000),
    "coco digits": ("coco", coco().replace('"width": 10', f'"width": {DIGITS}').encode()),
    "coco many digits": ("coco", coco().replace("5, 5", f"5, 1{'0' * 400}").encode()),
    "coco infinite": ("coco", coco().replace('"width": 10', '"width": 1e999').encode()),
    "coco NaN": ("coco", coco().replace("5, 5", "5, NaN").encode()),
    "coco wide": ("coco", coco().replace('"width": 10', f'"width": 1{"0" * 400}').encode()),
    "coco list": ("coco", b"[1, 2]"),
    "coco text": ("coco", coco(annotations=["a", 1]).encode()),
    "coco number": ("coco", coco(annotations=1).encode()),
    "coco cut": ("coco", coco()[:-9].encode()),
    "coco long name": ("coco", coco().replace("a.jpg", f"{LONG}.jpg").encode()),
    "coco NUL": ("coco", coco().replace("a.jpg", "a\\u0000.jpg").encode()),
    "coco surrogate": ("coco", coco().replace("a.jpg", "\\ud800.jpg").encode()),
    "coco outside": ("coco", coco().replace("a.jpg", "../../a.jpg").encode()),
    "coco unhashable": ("coco", coco().replace('"image_id": 1', '"image_id": []').encode()),
    "coco UTF-16": ("coco", coco().encode("utf-16")),
    "coco one large piece": ("coco", b'{"a": "' + b"x" * (20 << 20) + b'"}'),
    "voc entities": ("voc", DOCTYPE.format("utf-8").encode()),
    "voc entities in UTF-16": ("voc", DOCTYPE.format("utf-16").encode("utf-16")),
    "voc entities in EBCDIC": ("voc", DOCTYPE.format("cp037").encode("cp037")),
    "voc digits": ("voc", voc(box(DIGITS)).replace("<width>9", f"<width>{DIGITS}").encode()),
    "voc wide": ("voc", voc(box("1")).replace("<width>9", f"<width>1{'0' * 400}").encode()),
    "voc no box": ("voc", voc("<object><name>a</name></object>").encode()),
    "voc deep": ("voc", b"<a>" * 200_000),
    "voc class": ("voc", voc(box("1", "\x85" * 4)).encode()),
    "wheat nested": ("wheat", b"image_id,width,height,bbox,source\na,1,1," + b"[" * 60_000 + b",x\n"),
    "wheat short": ("wheat", b"image_name,BoxesString,domain\na\n"),
    "wheat long name": ("wheat", b"image_name,BoxesString,domain\n%s.jpg,no_box,x\n" % LONG.encode()),
    "wheat field": ("wheat", b"image_name,BoxesString,domain\n" + b"a" * 200_000 + b",no_box,x\n"),
    "wheat line": ("wheat", b"image_name,BoxesString,domain\n" + b"a," * 700_000),
    "visdrone digits": ("visdrone", f"{DIGITS},1,1,1,1,1\n".encode()),
    "visdrone negative": ("visdrone", b"1,1,-5,-5,1,1\n\x00\xff"),
}


@pytest.mark.parametrize("kind", ANNOTATIONS)
def test_hostile_annotations_are_one_data_error(tmp_path: Path, kind: str) -> None:
    convert, content = ANNOTATIONS[kind]
    convert_file(tmp_path, convert, content)


def convert_file(root: Path, convert: str, content: bytes) -> None:
    """Run one converter on one file of annotations; only a DataError that can be printed may come out of it."""
    arguments = {"source": "a.json", "images": "images"}
    target = root / "a.json"
    if convert == "voc":
        arguments = {"source": ".", "split": "train", "into": "train"}
        for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        (root / "ImageSets/Main/train.txt").write_text("a\n")
        (root / "JPEGImages/a.jpg").write_bytes(b"")
        target = root / "Annotations/a.xml"
    elif convert == "visdrone":
        arguments = {"source": "."}
        (root / "annotations").mkdir(exist_ok=True)
        target = root / "annotations/a.txt"
    target.write_bytes(content)
    with pytest.raises(DataError) as caught:
        CONVERTERS[convert](root, ["a"], **arguments)
    str(caught.value).encode()
    assert len(str(caught.value)) < 2000


def test_a_large_coco_file_is_read_piece_by_piece(tmp_path: Path, measured: Measured) -> None:
    row = json.dumps({"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "segmentation": [[1.5] * 40]})
    head = coco()[:-1].partition('"annotations"')[0]
    with open(tmp_path / "a.json", "w") as file:
        file.write(head + '"annotations": [' + ", ".join([row] * 1000))
        for _ in range(60):
            file.write(", " + ", ".join([row] * 1000))
        file.write("]}")
    setup = """
from starling.data.fetch.converters import CONVERTERS
def read(path):
    assert CONVERTERS["coco"](path.parent, ["a"], source=path.name, images="images") == 1
"""
    assert measured(setup, [tmp_path / "a.json"], most_bytes=60 << 20) == ["taken"]
    assert (tmp_path / "labels/a.txt").read_text() == "0 0.350000 0.350000 0.500000 0.500000\n"


@pytest.mark.parametrize("text", ["{}", '{"a": 1, "b": [], "c": [1, {"d": [2]}]}', ' {"a":\n[12 , 3]} '])
def test_pieces_of_a_json_file_are_what_the_whole_holds(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    whole = json.loads(text)
    expected = [(k, e) for k, v in whole.items() for e in (v if isinstance(v, list) else [v])]
    assert list(members(tmp_path / "a.json")) == expected


def test_a_message_about_any_name_can_be_printed(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"caf\xc3\xa9.jpg\n")
    for source in (os.fsdecode(b"/\xff\xfe.jpg"), f"{tmp_path}/list.txt"):
        with pytest.raises(StarlingError):
            find_sources(source)
