"""Images: what is refused and why, EXIF rotation, and that users' files stay as they are."""

from __future__ import annotations

import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from starling.core.errors import DataError
from starling.data.dataset.images import UnusableImageError, decode_image, read_header


def _gradient(height: int = 24, width: int = 36) -> Image.Image:
    ys, xs = np.mgrid[:height, :width]
    pixels = np.stack((xs * 255 // width, ys * 255 // height, np.full_like(xs, 60)), 2)
    return Image.fromarray(pixels.astype(np.uint8))


def _bomb(side: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["jpg", "png", "bmp", "webp", "tif", "gif"])
def test_every_accepted_format_decodes_to_rgb_of_the_header_size(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    _gradient(240, 360).save(path)
    header = read_header(path)
    image = decode_image(path)
    assert image.dtype == np.uint8
    assert image.shape == (240, 360, 3)
    assert header.hw == (240, 360)
    assert header.file_size == path.stat().st_size
    assert image[5, 340, 0] > 200  # red grows to the right: channels are in RGB order
    assert image[5, 340, 1] < 60


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_exif_rotation_is_applied_to_header_and_pixels_alike(
    tmp_path: Path, kind: str, orientation: int
) -> None:
    path = tmp_path / f"a.{kind}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = _gradient()
    stored.save(path, exif=exif, **({"quality": 100, "subsampling": 0} if kind == "jpg" else {}))
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    upright = np.array(stored.transpose(turns[orientation]) if orientation > 1 else stored, int)
    image = decode_image(path)
    assert read_header(path).hw == image.shape[:2] == upright.shape[:2]
    assert abs(image - upright).mean() < 12  # lossy formats


def _pixels(image: Image.Image) -> np.ndarray:
    return np.array(image.convert("RGB"), int)


def _check(path: Path, expected: np.ndarray, tolerance: int = 0) -> None:
    decoded = decode_image(path)
    assert decoded.dtype == np.uint8
    assert decoded.shape == expected.shape == (*read_header(path).hw, 3)
    assert np.abs(decoded - expected).max() <= tolerance


BEST_JPEG = {"quality": 100, "subsampling": 0}


@pytest.mark.parametrize("kind", ["jpg", "tif"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_printing_inks_become_the_colours_they_mean(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{kind}"
    _gradient().convert("CMYK").save(path, exif=exif, **(BEST_JPEG if kind == "jpg" else {}))
    _check(path, np.rot90(_pixels(_gradient()), -1 if orientation == 6 else 0), tolerance=2)


@pytest.mark.parametrize("kind", ["png", "tif"])
@pytest.mark.parametrize("channels", ["grey", "colour", "transparent"])
def test_sixteen_bits_are_rounded_to_eight(tmp_path: Path, kind: str, channels: str) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (20, 30, 4)).astype(np.uint16)
    deep[0, 0], deep[0, 1] = 65535, 256  # 256 of 65535 is one of 255, not none
    stored = {"grey": deep[..., 0], "colour": deep[..., 2::-1], "transparent": deep[..., (2, 1, 0, 3)]}
    path = tmp_path / f"a.{kind}"
    cv2.imwrite(str(path), stored[channels])
    expected = np.rint(deep[..., :3] / 257).astype(int)
    _check(path, expected[..., :1].repeat(3, 2) if channels == "grey" else expected)


def test_a_turned_deep_image_stands_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = np.array(_gradient().convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "a.tif", exif=exif)
    _check(tmp_path / "a.tif", np.rot90(grey, -1)[..., None].repeat(3, 2).astype(int))


@pytest.mark.parametrize("kind", ["png", "tif", "bmp", "gif"])
@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_black_and_white_and_palettes_become_rgb(tmp_path: Path, kind: str, mode: str) -> None:
    image = _gradient().quantize(64) if mode == "P" else _gradient().convert(mode)
    image.save(tmp_path / f"a.{kind}")
    _check(tmp_path / f"a.{kind}", _pixels(image))


@pytest.mark.parametrize("kind", ["png", "tif", "webp"])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_is_dropped_and_colours_stay(tmp_path: Path, kind: str, mode: str) -> None:
    pixels = np.array(_gradient().convert(mode))
    pixels[..., -1] = np.arange(pixels.shape[1])
    image = Image.fromarray(pixels, mode)
    image.save(tmp_path / f"a.{kind}", **({"lossless": True, "exact": True} if kind == "webp" else {}))
    _check(tmp_path / f"a.{kind}", _pixels(_gradient().convert(mode)))


def _write_unusable(folder: Path) -> dict[str, str]:
    whole = folder / "whole.jpg"
    _gradient(100, 100).save(whole)
    content = whole.read_bytes()
    (folder / "truncated.jpg").write_bytes(content[: len(content) // 2])
    _gradient(100, 100).save(folder / "whole.png")
    content = (folder / "whole.png").read_bytes()
    (folder / "truncated.png").write_bytes(content[: len(content) // 2])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("not an image")
    _gradient().convert("I").save(folder / "integers.tif")
    _gradient().convert("F").save(folder / "floats.tif")
    frames = [_gradient(), _gradient().rotate(90)]
    for name in ("animated.gif", "animated.png", "animated.webp"):
        frames[0].save(folder / name, save_all=True, append_images=frames[1:])
    _gradient(9, 40).save(folder / "small.png")
    (folder / "bomb.png").write_bytes(_bomb(50_000))
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    return {
        "truncated.jpg": "truncated",
        "truncated.png": "truncated",
        "empty.jpg": "empty",
        "text.jpg": "not an image",
        "integers.tif": "mode I; convert it to 8-bit RGB",
        "floats.tif": "mode F; convert it to 8-bit RGB",
        "animated.gif": "animated",
        "animated.png": "animated",
        "animated.webp": "animated",
        "small.png": "10 or more",
        "bomb.png": "pixels; scale it down",
        "pipe.jpg": "not a regular file",
        "folder.jpg": "not a regular file",
        "dangling.jpg": "cannot be read",
    }


def test_each_unusable_image_is_refused_with_its_reason_and_left_untouched(tmp_path: Path) -> None:
    expected = _write_unusable(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for name, reason in expected.items():
        with pytest.raises(UnusableImageError, match=reason):
            read_header(tmp_path / name)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_a_truncated_image_is_never_decoded_to_grey(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    _gradient(100, 100).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"a\.jpg: truncated"):
        decode_image(path)


def test_a_header_bomb_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(_bomb(50_000))
    tracemalloc.start()
    with pytest.raises(UnusableImageError):
        read_header(path)
    with pytest.raises(DataError):
        decode_image(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 2000), st.binary(min_size=1, max_size=8), st.sampled_from(["jpg", "png", "tif", "webp"])
)
def test_bytes_damaged_anywhere_raise_only_our_own_errors(
    tmp_path: Path, position: int, damage: bytes, kind: str
) -> None:
    path = tmp_path / f"a.{kind}"
    _gradient().save(path)
    content = bytearray(path.read_bytes())
    position %= len(content)
    content[position : position + len(damage)] = damage
    path.write_bytes(content)
    try:
        header = read_header(path)
        assert decode_image(path).shape[:2] == header.hw
    except DataError:
        pass
