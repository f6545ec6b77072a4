"""All frames of films and animated images are looked at, and what is passed over is counted."""

from __future__ import annotations

import csv
import io
import json
import shutil
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from starling.cli.detect import main
from starling.core.errors import DataError
from starling.data.dataset.left_out import LeftOut
from starling.data.sources.edit_list import shown_seconds
from starling.data.sources.films import ends_early, is_animated
from starling.data.sources.sources import Source, find_sources, frames
from tests.conftest import CELL_DETECTOR, MINI_SET

WEIGHTS = str(CELL_DETECTOR)
IMAGE = min((MINI_SET / "images" / "val").glob("*.jpg"))
NOISE = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8), (5, 5), 0)
CODECS = [("mp4", "mp4v"), ("avi", "MJPG"), ("avi", "XVID"), ("mkv", "mp4v"), ("webm", "VP80"), ("mov", "mp4v"),
          ("mpg", "mpg1"), ("mpg", "mpg2"), ("ts", "mpg2"), ("wmv", "WMV2"), ("asf", "WMV1")]  # fmt: skip


def write_film(path: Path, codec: str, length: int, fps: float = 10) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, (64, 48))
    if not writer.isOpened():
        pytest.skip(f"this OpenCV has no {codec}")
    for shift in range(length):
        writer.write(np.roll(NOISE, shift * 3, axis=1))
    writer.release()


def growing_gif(first: int, second: int) -> bytes:
    """Return a GIF of two square frames; the header knows the first one's side alone."""
    whole = []
    for side in (first, second):
        target = io.BytesIO()
        Image.new("P", (side, side)).save(target, "GIF")
        whole.append(target.getvalue())
    frame = whole[1].index(b",", 13 + (3 << (whole[1][10] & 7) + 1 if whole[1][10] & 0x80 else 0))
    return whole[0][:-1] + whole[1][frame:]


def write_animation(path: Path, length: int) -> None:
    rng = np.random.default_rng(1)
    images = [Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)) for _ in range(length)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=50)


def look(path: Path, stride: int = 1) -> tuple[list[int], list[tuple[int, int | None]]]:
    """Return the numbers of the frames that a source gives, and what is said of its end."""
    (source,) = find_sources(str(path), LeftOut())
    ends: list[tuple[int, int | None]] = []
    numbers = [one.number for one in frames(source, path, stride, lambda read, of: ends.append((read, of)))]
    return numbers, ends


@pytest.mark.parametrize(("suffix", "codec"), CODECS)
@pytest.mark.parametrize("length", [1, 7, 60])
def test_a_healthy_film_is_never_called_damaged(tmp_path: Path, suffix: str, codec: str, length: int) -> None:
    path = tmp_path / f"film.{suffix}"
    write_film(path, codec, length, fps=10 if codec[:3] != "mpg" else 25)
    numbers, ends = look(path)
    assert (numbers, ends) == (list(range(length)), [])
    assert look(path, stride=4)[1] == []


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("mp4", "mp4v"), ("mov", "mp4v"), ("avi", "MJPG"), ("mkv", "mp4v"), ("webm", "VP80")],
)
def test_a_film_with_damaged_bytes_says_how_many_of_its_frames_were_read(
    tmp_path: Path, suffix: str, codec: str
) -> None:
    path = tmp_path / f"film.{suffix}"
    write_film(path, codec, 60)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if suffix in ("mkv", "webm", "avi"):  # these go on after a hole, so they are cut
        del content[middle:]
    else:
        content[middle : middle + 4000] = b"\x55" * 4000
    path.write_bytes(content)
    numbers, ends = look(path)
    assert 0 < len(numbers) < 58
    assert ends == [(len(numbers), 60)]


def test_a_film_is_short_only_where_no_witness_says_otherwise() -> None:
    assert ends_early(31, 60, index="mp4", last_s=3.0, fps=10)
    assert not ends_early(58, 60, index="mp4", last_s=5.7, fps=10)
    assert not ends_early(980, 1000, index="mp4", last_s=98, fps=10)
    assert not ends_early(31, 0, index="mp4", last_s=3.0, fps=10)
    assert ends_early(31, 60, index="avi", last_s=3.0, fps=10)
    assert not ends_early(
        31, 60, index="avi", last_s=5.9, fps=10
    )  # frames that hold nothing new are passed over
    # A guess of 600 frames from 20 s at a rate of 30: the rate varies, and 200 frames fill the time.
    assert not ends_early(200, 600, index=None, last_s=19.9, fps=30)
    assert ends_early(200, 600, index=None, last_s=6.6, fps=30)
    assert ends_early(200, 600, index=None, last_s=0.0, fps=30)  # a file without times
    assert not ends_early(1, 100, index=None, last_s=0.0, fps=1000)  # one frame of a tenth of a second


def test_a_film_that_a_phone_has_trimmed_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    write_film(path, "mp4v", 60)
    content = bytearray(path.read_bytes())
    at = content.index(b"elst") + 12
    content[at : at + 4] = struct.pack(">I", 2000)  # of 6,000 ms
    path.write_bytes(content)
    assert shown_seconds(path) == 2.0
    numbers, ends = look(path)
    assert len(numbers) == 20
    assert ends == []


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_edit_list_says_nothing(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "film.mp4"
    write_film(path, "mp4v", 5)
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    for place in rng.integers(content.index(b"moov") - 4, len(content), 20):
        content[place] = rng.integers(256)
    path.write_bytes(content[: len(content) - int(rng.integers(200))])
    told = shown_seconds(path)
    assert told is None or told >= 0


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "apng"])
def test_an_animated_image_is_a_film_of_all_its_frames(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"moving.{suffix}"
    write_animation(tmp_path / f"moving.{suffix.removeprefix('a')}", 5)
    if suffix == "apng":
        (tmp_path / "moving.png").rename(path)
    (source,) = find_sources(str(path), LeftOut())
    seen = list(frames(source, path, 2))
    assert [one.number for one in seen] == [0, 2, 4]
    assert [one.image.shape for one in seen] == [(48, 64, 3)] * 3
    assert seen[0].fps == pytest.approx(10)  # every second one of 20
    assert not np.array_equal(seen[0].image, seen[1].image)
    assert look(path) == ([0, 1, 2, 3, 4], [])


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_image_of_one_frame_stays_an_image(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"still.{suffix}"
    Image.fromarray(NOISE).save(path)
    assert not is_animated(path)
    assert find_sources(str(path), LeftOut()) == [Source(kind="image", address=str(path))]


def test_an_animation_whose_frames_take_over_a_gibibyte_to_decode_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "growing.gif"
    path.write_bytes(growing_gif(64, 6000))
    with pytest.raises(DataError, match="frames of 6000 x 6000 pixels, over 35,651,584; scale them down"):
        look(path)
    path.write_bytes(growing_gif(6000, 6000))
    with pytest.raises(DataError, match="frames of 6000 x 6000"):
        look(path)


@pytest.mark.parametrize("suffix", ["gif", "png"])
@pytest.mark.parametrize("damage", ["cut", "hole"])
def test_a_damaged_animation_says_so(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"moving.{suffix}"
    write_animation(path, 12)
    content = path.read_bytes()
    middle = len(content) // 2
    rest = b"" if damage == "cut" else bytes(400) + content[middle + 400 :]
    path.write_bytes(content[:middle] + rest)
    numbers, ends = look(path)
    assert 0 < len(numbers) < 12
    assert ends == [(len(numbers), None if suffix == "gif" else 12)]


def test_what_is_passed_over_in_a_folder_is_counted_by_suffix(tmp_path: Path) -> None:
    for name in (
        "a.jpg",
        "b.jfif",
        "c.jpe",
        "d.avif",
        "e.HEIC",
        "f.heic",
        "._a.jpg",
        ".hidden.png",
        "notes.md",
        "g.jp2",
    ):
        shutil.copyfile(IMAGE, tmp_path / name)
    left_out = LeftOut()
    found = find_sources(str(tmp_path), left_out)
    assert [Path(str(one.address)).name for one in found] == ["a.jpg", "b.jfif", "c.jpe"]
    kinds = {row["reason"]: row["kinds"] for row in left_out.as_list()}
    assert sorted(kinds.values(), key=len) == [{".jpg": 1, ".png": 1}, {".avif": 1, ".heic": 2, ".jp2": 1}]


def test_a_pattern_leaves_hidden_folders_out_unless_they_are_written_down(tmp_path: Path) -> None:
    for name in (
        "a.jpg",
        ".ipynb_checkpoints/a-checkpoint.jpg",
        "__MACOSX/._a.jpg",
        "sub/b.jpg",
        "sub/d.ppm",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(IMAGE, tmp_path / name)
    left_out = LeftOut()
    found = find_sources(f"{tmp_path}/**/*", left_out)
    assert [Path(str(one.address)).name for one in found] == ["a.jpg", "b.jpg"]
    assert len(left_out) == 3
    meant = find_sources(f"{tmp_path}/.ipynb_checkpoints/*.jpg", LeftOut())
    assert [Path(str(one.address)).name for one in meant] == ["a-checkpoint.jpg"]


def test_a_list_counts_what_is_not_read_and_a_folder_of_nothing_else_names_it(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.heic", "._a.jpg"):
        shutil.copyfile(IMAGE, tmp_path / name)
    listed = tmp_path / "list.txt"
    listed.write_text("a.jpg\nb.heic\n._a.jpg\n")
    left_out = LeftOut()
    assert len(find_sources(str(listed), left_out)) == 1
    assert len(left_out) == 2
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"\.heic 1"):
        find_sources(str(tmp_path), LeftOut())
    with pytest.raises(DataError, match="convert it to JPEG"):
        find_sources(str(tmp_path / "b.heic"), LeftOut())


def test_console_report_and_json_give_one_account_of_what_is_left_out(
    tmp_path: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sources"
    folder.mkdir()
    write_film(folder / "hole.mp4", "mp4v", 60)
    content = bytearray((folder / "hole.mp4").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = b"\x55" * 4000
    (folder / "hole.mp4").write_bytes(content)
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "x.heic").touch()
    flags = [
        "--weights",
        WEIGHTS,
        "--device",
        "cpu",
        "--json",
        "--imgsz",
        "32",
        "--nosave",
        "--vid-stride",
        "16",
    ]
    assert main([*flags, "--source", str(folder)]) == 0
    out = capsys.readouterr().out
    told = json.loads(out.splitlines()[-1])
    (damaged,) = told["damaged"]
    assert damaged["listed"] == 60
    assert f"hole.mp4: {damaged['frames']} of 60 frames: the file is damaged" in out
    counts = {row["reason"]: row["count"] for row in told["left_out"]}
    assert sorted(counts.values()) == [1, 1, 60 - damaged["frames"]]
    assert all(f"left out: {reason}" in out for reason in counts)
    assert len(list(csv.reader((Path(told["run"]) / "left_out.csv").open()))) == 1 + len(counts)


def test_a_pattern_may_follow_a_folder_with_brackets_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "set [1]"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (folder / name).touch()
    assert len(find_sources(str(folder / "*.jpg"))) == 2
    assert len(find_sources(f"{tmp_path}/set [[]1]/a.*")) == 1


def test_an_animation_that_ends_early_is_counted_without_a_number_of_frames_that_nobody_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *others = [Image.new("RGB", (64, 64), (40 * number, 0, 0)) for number in range(5)]
    first.save(tmp_path / "a.gif", save_all=True, append_images=others, duration=50)
    content = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(content[: len(content) * 2 // 3])
    flags = ["--weights", WEIGHTS, "--device", "cpu", "--json", "--imgsz", "32", "--nosave"]
    assert main([*flags, "--source", str(tmp_path / "a.gif")]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["damaged"][0]["listed"] is None
    assert [(row["reason"], row["count"]) for row in told["left_out"]] == [("ends of damaged films", 1)]
