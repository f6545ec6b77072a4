"""Faults 20, 21, 22, 24 and 25: what a dataset may hold, from the command line to the exit code."""

from __future__ import annotations

import csv
import io
import os
import resource
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from starling import settings
from starling.cli import train
from starling.core.errors import DataError
from starling.data.dataset.dataset import Dataset, DatasetDescription
from starling.data.dataset.findings import REPORT, write_report
from starling.data.dataset.images import decode_image
from tests.conftest import REPOSITORY

GOOD = "0 .5 .5 .4 .4\n"


@pytest.fixture(autouse=True)
def no_tracking(runs: Path) -> None:
    settings.update({"mlflow": False, "tensorboard": False})


def _image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))


def _encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    _image().convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A dataset of four whole images to train on and one to validate on."""
    root = tmp_path / "set"
    for split, count in (("train", 4), ("val", 1)):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for number in range(count):
            (root / "images" / split / f"{number}.png").write_bytes(_encoded("PNG"))
            (root / "labels" / split / f"{number}.txt").write_text(GOOD)
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: [x, y]\n")
    return root


def _add(data: Path, name: str, content: bytes, label: bytes = GOOD.encode()) -> None:
    (data / "images" / "train" / name).write_bytes(content)
    (data / "labels" / "train" / name).with_suffix(".txt").write_bytes(label)


def _train(tiny_args: list[str], data: Path, *more: str) -> int:
    args = [*tiny_args, "--noplots", "--noval", "--epochs", "1", "--data", str(data / "data.yaml")]
    return train.main([*args, *more])


def _report(runs: Path) -> dict[str, dict[str, str]]:
    with open(runs / "train" / "exp" / REPORT, newline="") as file:
        return {Path(row["file"]).name: row for row in csv.DictReader(file)}


def _snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in folder.rglob("*")
    }


def test_unusable_images_are_skipped_named_and_left_as_they_are(
    tiny_args: list[str], data: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = _encoded("JPEG", exif=exif)
    frames = {"save_all": True, "append_images": [_image().rotate(90)]}
    _add(data, "turned.jpg", whole)
    _add(data, "inks.jpg", _encoded("JPEG", "CMYK"))
    _add(data, "deep.tif", _encoded("TIFF", "I;16"))
    _add(data, "cut.jpg", whole[: len(whole) // 2])
    _add(data, "empty.jpg", b"")
    _add(data, "text.jpg", b"hello")
    _add(data, "moving.gif", _encoded("GIF", **frames))
    before = _snapshot(data)
    assert _train(tiny_args, data) == 0
    output = capsys.readouterr().out
    assert "train: 7 images" in output  # four plain, turned, inks, deep
    assert "4 images left out" in output
    assert str(runs / "train" / "exp" / REPORT) in output
    report = _report(runs)
    assert set(report) == {"cut.jpg", "empty.jpg", "text.jpg", "moving.gif"}
    assert all(row["problem"] and row["remedy"] for row in report.values())
    assert _train(tiny_args, data, "--strict") == 3
    assert "--strict (4)" in capsys.readouterr().err
    assert _snapshot(data) == before


def _header_bombs(side: int) -> dict[str, bytes]:
    jpeg, bmp = bytearray(_encoded("JPEG")), bytearray(_encoded("BMP"))
    start = jpeg.index(b"\xff\xc0") + 5  # marker, length, bits; then height and width
    jpeg[start : start + 4] = struct.pack(">HH", side, side)
    bmp[18:26] = struct.pack("<ii", side, side)
    gif, png = bytearray(_encoded("GIF")), bytearray(_encoded("PNG"))
    gif[6:10] = struct.pack("<HH", side, side)
    png[16:24] = struct.pack(">II", side, side)
    return {"bomb.jpg": bytes(jpeg), "bomb.bmp": bytes(bmp), "bomb.gif": bytes(gif), "bomb.png": bytes(png)}


LOAD_AND_MEASURE = """
import resource, sys
from pathlib import Path
from starling.data.dataset.dataset import Dataset, DatasetDescription
from starling.data.dataset.images import decode_image
from starling.core.errors import DataError
description = DatasetDescription.from_yaml(Path(sys.argv[1]) / "data.yaml")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
dataset = Dataset.load(description, "train")
for path in Path(sys.argv[1]).rglob("bomb.*"):
    if path.suffix != ".txt":
        try:
            decode_image(path)
        except DataError:
            continue
        sys.exit(f"{path} was decoded")
print(len(dataset), dataset.skipped, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.parametrize("side", [50_000, 13_400])  # far above the limit, and just above it
def test_headers_that_claim_gigapixels_are_refused_before_memory_is_taken(data: Path, side: int) -> None:
    for name, content in _header_bombs(side).items():
        _add(data, name, content)
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_MEASURE, str(data)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    usable, skipped, mebibytes = map(int, done.stdout.split())
    assert (usable, skipped) == (4, 4)
    assert mebibytes < 50


def test_label_faults_are_named_by_file_and_line_and_the_harmless_accepted(
    tiny_args: list[str], data: Path, runs: Path
) -> None:
    faults = {
        "nan": b"0 nan .5 .1 .1", "below": b"0 -.5 .5 .1 .1", "above": b"0 1.5 .5 .1 .1",
        "six": b"0 .5 .5 .1 .1 .9", "class": b"2 .5 .5 .1 .1", "word": b"cat .5 .5 .1 .1",
    }  # fmt: skip
    for name, row in faults.items():
        _add(data, f"{name}.png", _encoded("PNG"), GOOD.encode() + row + b"\n")
    _add(data, "bytes.png", _encoded("PNG"), b"\xff\xfe0\x00")
    _add(data, "bom.png", _encoded("PNG"), b"\xef\xbb\xbf0 .5 .5 .4 .4\r\n1 .2 .2 .1 .1\r\n")
    _add(data, "none.png", _encoded("PNG"), b"")
    assert _train(tiny_args, data) == 0
    report = _report(runs)
    assert set(report) == {f"{name}.txt" for name in (*faults, "bytes")}
    assert {report[f"{name}.txt"]["line"] for name in faults} == {"2"}
    dataset = Dataset.load(DatasetDescription.from_yaml(data / "data.yaml"), "train")
    assert len(dataset) == 6
    assert {path.stem: len(rows) for path, rows in zip(dataset.images, dataset.labels, strict=True)}[
        "bom"
    ] == 2


def test_a_million_rows_are_refused_by_name_in_bounded_time(data: Path) -> None:
    rows = "".join(f"0 .5 .5 .1 {1e-6 * number:.6f}\n" for number in range(1, 1_000_001))
    _add(data, "flood.png", _encoded("PNG"), rows.encode())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    dataset = Dataset.load(DatasetDescription.from_yaml(data / "data.yaml"), "train")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 5
    (problem,) = dataset.problems
    assert Path(problem.file).name == "flood.txt"
    assert "more than 16 MiB" in problem.problem
    assert len(dataset) == 4


def test_paths_that_lead_out_of_a_dataset_are_only_read_and_nothing_is_written_there(
    tiny_args: list[str], data: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = data.parent / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("hunter2\n")
    (outside / "seen.png").write_bytes(_encoded("PNG"))
    (data / "images" / "train" / "link.png").symlink_to(outside / "secret.txt")
    (data / "images" / "train" / "far.png").symlink_to(outside / "seen.png")
    (data / "images" / "train" / "loop").symlink_to(data / "images")
    before = _snapshot(data), _snapshot(outside)
    assert _train(tiny_args, data, "--cache", "disk") == 0
    assert (_snapshot(data), _snapshot(outside)) == before
    assert sorted(path.name for path in data.parent.iterdir()) == ["outside", "runs", "set"]
    report = _report(runs)
    assert report["link.png"]["problem"] == "not an image of a known format"
    assert "hunter2" not in capsys.readouterr().out + (runs / "train" / "exp" / REPORT).read_text()


@pytest.mark.parametrize(
    "text",
    [
        "path: ../../../../../../etc\ntrain: passwd\nval: passwd\nnames: [x]\n",
        "path: /etc\ntrain: .\nval: .\nnames: [x]\n",
        "train: list.txt\nval: list.txt\nnames: [x]\n",
    ],
)
def test_a_description_that_points_at_system_files_is_a_data_error(
    tiny_args: list[str], data: Path, runs: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "data.yaml").write_text(text)
    (data / "list.txt").write_text("/etc/passwd\n../../../../../../../../etc/passwd\n")
    assert _train(tiny_args, data) == 3
    printed = capsys.readouterr()
    assert "root:" not in printed.out + printed.err
    assert not (runs / "train").exists()


def test_a_report_is_never_written_through_a_link(data: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious.csv"
    precious.write_text("mine\n")
    (tmp_path / REPORT).symlink_to(precious)
    _add(data, "empty.jpg", b"")
    dataset = Dataset.load(DatasetDescription.from_yaml(data / "data.yaml"), "train")
    write_report(tmp_path / REPORT, dataset.findings)
    assert precious.read_text() == "mine\n"
    assert not (tmp_path / REPORT).is_symlink()


def test_a_file_name_that_is_no_text_is_reported(data: Path, tmp_path: Path) -> None:
    with open(os.fsencode(data / "images" / "train") + b'/\xff,\n".jpg', "wb"):
        pass
    dataset = Dataset.load(DatasetDescription.from_yaml(data / "data.yaml"), "train")
    assert write_report(tmp_path / REPORT, dataset.findings) == 1
    with open(tmp_path / REPORT, newline="") as file:
        assert len(list(csv.DictReader(file))) == 1


WHOLE = {kind: _encoded(kind) for kind in ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP")} | {
    "inks": _encoded("JPEG", "CMYK"),
    "deep": _encoded("TIFF", "I;16"),
    "clear": _encoded("TIFF", "RGBA"),
}


@st.composite
def _damaged(draw: st.DrawFn) -> bytes:
    content = bytearray(WHOLE[draw(st.sampled_from(sorted(WHOLE)))])
    for _ in range(draw(st.integers(0, 3))):
        position = draw(st.integers(0, len(content) - 1) | st.integers(0, min(len(content) - 1, 200)))
        damage = draw(st.binary(min_size=1, max_size=6))
        content[position : position + len(damage)] = damage
    return bytes(content[: draw(st.none() | st.integers(0, len(content)))])


LABEL = st.binary(max_size=80) | st.text(alphabet="0123456789.eE-+ \n\rnaif\ufeff", max_size=80).map(
    str.encode
)


@hypothesis_settings(max_examples=120, deadline=None)
@given(_damaged() | st.binary(max_size=100), LABEL, st.sampled_from([".jpg", ".png", ".tif", ".gif"]))
def test_whatever_images_and_labels_hold_only_our_own_errors_escape(
    content: bytes, label: bytes, suffix: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / f"a{suffix}").write_bytes(content)
        (root / "a.txt").write_bytes(label)
        (root / "data.yaml").write_text("train: .\nnames: [x, y]\n")
        try:
            dataset = Dataset.load(DatasetDescription.from_yaml(root / "data.yaml"), "train")
            write_report(root / REPORT, dataset.findings)
            pixels = decode_image(dataset.images[0])
        except DataError as error:
            said = str(error)
        else:
            said = ""
        if said:
            assert f"a{suffix}" in said or "a.txt" in said
            return
        assert pixels.shape == (*dataset.shapes_hw[0], 3)
        rows = dataset.labels[0]
        assert ((rows[:, 1:] >= 0) & (rows[:, 1:] <= 1)).all()
        assert set(rows[:, 0]) <= {0.0, 1.0}
        assert all(
            polygon is None or ((polygon >= 0) & (polygon <= 1)).all()
            for polygons in dataset.polygons
            for polygon in polygons
        )
