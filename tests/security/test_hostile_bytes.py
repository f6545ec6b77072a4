"""Valid archives, images, labels and annotations with bytes changed: only our own errors come out, within the budget.

Seeded: the same bytes in each run. Each kind stops after its share of seconds, however slow the machine is.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from starling.core.budget import SECONDS
from starling.core.errors import StarlingError
from starling.data.dataset.image_lists import find_images
from starling.data.dataset.images import decode_image, read_header
from starling.data.dataset.labels import read_labels
from starling.data.fetch.archive import unpack
from starling.data.fetch.converters import CONVERTERS
from starling.data.sources.sources import find_sources
from starling.plots.results import read_results
from starling.search.importing import read_evolve_csv
from tests.conftest import REPOSITORY
from tests.security.hostile_archives import GOOD_TAR, GOOD_ZIP, zip_of
from tests.security.hostile_images import png, saved, scans_jpeg, tiff

ROUNDS, SHARE_S = 120, 4.0
Reader = Callable[[Path], object]

ARCHIVES = {
    "tar": GOOD_TAR,
    "gz": gzip.compress(GOOD_TAR),
    "bz2": bz2.compress(GOOD_TAR),
    "xz": lzma.compress(GOOD_TAR),
    "zip": GOOD_ZIP,
    "stored zip": zip_of(("a/b.txt", b"abc" * 99), method=zipfile.ZIP_STORED),
    "lzma zip": zip_of(("a/b.txt", b"abc" * 99), method=zipfile.ZIP_LZMA),
}
IMAGES = {
    "a.jpg": saved("RGB", 40, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"),
    "progressive.jpg": scans_jpeg(2, 40),
    "inks.jpg": saved("CMYK", 40, "JPEG"),
    "a.png": saved("P", 40, "PNG"),
    "deep.png": png(40, 16, 6, interlaced=True),
    "a.webp": saved("RGBA", 40, "WEBP", lossless=True),
    "a.tif": tiff(side=40),
    "packed.tif": saved("RGBA", 40, "TIFF", compression="tiff_lzw"),
    "a.bmp": saved("RGB", 40, "BMP"),
    "a.gif": saved("P", 40, "GIF"),
}
LABELS = {"rows": b"0 0.5 0.5 0.25 0.25\n1 .1 .2 .3 .4 .5 .6 .7 .8\r\n", "mark": b"\xef\xbb\xbf0 1 1 1 1"}
LISTS = {"list": b"./images/a.jpg\n/data/b.png\n# c\nrtsp://u:p@h/x\nhttp://h/a.jpg\n3\n"}
TABLES = {
    "results": b"epoch, train/box_loss, metrics/mAP_0.5, metrics/mAP_0.5:0.95\n0, 0.1, 0.2, 0.3\n1, 0.1, 0.2, 0.3\n",
    "evolve": (REPOSITORY / "tests/golden/evolve.csv").read_bytes()
    if (REPOSITORY / "tests/golden/evolve.csv").is_file()
    else b"metrics/precision,metrics/recall\n0.1,0.2\n",
}
COCO = json.dumps(
    {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 10, "height": 10}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "iscrowd": 0}],
    }
).encode()
VOC = (
    b"<annotation><size><width>9</width><height>9</height></size><object><name>a</name><bndbox><xmin>1</xmin>"
    b"<ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></object></annotation>"
)
WHEAT = b"image_name,BoxesString,domain\na.png,1 2 3 4;5 6 7 8,x\nb.png,no_box,x\n"
VISDRONE = b"1,2,3,4,1,1,0,0\n5,6,7,8,1,1,0,0\n"
INSERTS = (
    b"9" * 5000,
    b"\0",
    b"\xff\xff\xff\xff",
    b"[" * 3000,
    b"../",
    b"n" * 300,
    b"-1",
    b"1e999",
    b"nan",
    b"\x1b[2J",
)


def mutated(whole: bytes, seed: str) -> Iterator[bytes]:
    """Yield a file with bytes changed, cut out, repeated and put in, always the same ones for a seed."""
    generator = random.Random(seed)
    for _ in range(ROUNDS):
        content = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            at = generator.randrange(len(content) + 1)
            length = generator.randint(1, 40)
            how = generator.randrange(5)
            if how < 2 and content:
                content[min(at, len(content) - 1)] = generator.choice(
                    (0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256))
                )
            elif how == 2:
                del content[at : at + length]
            elif how == 3:
                content[at:at] = content[at : at + length] * generator.randint(1, 50)
            else:
                content[at:at] = generator.choice(INSERTS)
        yield bytes(content)


def only_our_errors(read: Reader, path: Path, samples: dict[str, bytes]) -> None:
    """Read every mutated sample; a StarlingError that can be printed may come out, within the budget's seconds."""
    for name, whole in samples.items():
        ends = time.monotonic() + SHARE_S / len(samples)
        for number, content in enumerate(mutated(whole, name)):
            path.write_bytes(content)
            began = time.monotonic()
            try:
                read(path)
            except StarlingError as error:
                str(error).encode()
            except Exception as error:
                raise AssertionError(f"{name}, round {number}: {type(error).__name__}: {error}") from error
            assert time.monotonic() - began < SECONDS, (name, number)
            if time.monotonic() > ends:
                break


def _unpack(path: Path) -> None:
    target = path.with_name("in")
    try:
        unpack(path, target)
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _image(path: Path) -> None:
    read_header(path)
    decode_image(path)


def _list(path: Path) -> None:
    find_images([path], path.parent, "train")
    find_sources(str(path))


def _converter(name: str, target: str, **arguments: str) -> tuple[str, Reader]:
    def read(path: Path) -> None:
        root = path.parent / "set"
        (root / "JPEGImages").mkdir(parents=True, exist_ok=True)
        (root / "JPEGImages/a.jpg").write_bytes(b"")
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, root / target)
        if name == "voc":
            (root / "ImageSets/Main").mkdir(parents=True)
            (root / "ImageSets/Main/train.txt").write_text("a\n")
        try:
            CONVERTERS[name](root, ["a"], **arguments)
        finally:
            shutil.rmtree(root)

    return name, read


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("read", "name", "samples"),
    [
        (_unpack, "a.zip", ARCHIVES),
        (_image, "a.jpg", IMAGES),
        (lambda path: read_labels(path, 2), "a.txt", LABELS),
        (_list, "a.txt", LISTS),
        (read_results, "results.csv", TABLES),
        (read_evolve_csv, "evolve.csv", TABLES),
        (_converter("coco", "a.json", source="a.json", images="images")[1], "a.json", {"coco": COCO}),
        (
            _converter("voc", "Annotations/a.xml", source=".", split="train", into="t")[1],
            "a.xml",
            {"voc": VOC},
        ),
        (_converter("wheat", "a.csv", source="a.csv", images="images")[1], "a.csv", {"wheat": WHEAT}),
        (_converter("visdrone", "annotations/a.txt", source=".")[1], "a.txt", {"visdrone": VISDRONE}),
    ],
    ids=["archives", "images", "labels", "lists", "results", "evolve", "coco", "voc", "wheat", "visdrone"],
)
def test_changed_bytes_raise_only_our_own_errors(
    tmp_path: Path, read: Reader, name: str, samples: dict[str, bytes]
) -> None:
    only_our_errors(read, tmp_path / name, samples)
