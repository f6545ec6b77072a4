"""Images on disk: look at the header first, refuse what cannot be used, decode to upright RGB.

Pillow reads the header without allocating memory for the pixels: a tiny file that claims 50,000 x 50,000 pixels is
refused before decoding. Users' files are only read, never written.
"""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
from pathlib import Path
from typing import IO, Any, Literal

import cv2
import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from starling.core.budget import MEMORY_BYTES, BudgetExceeded
from starling.core.errors import DataError
from starling.core.files.regular import open_regular, read_regular
from starling.data.dataset.image_cost import (
    DECODING,
    CountedFile,
    ImageHeader,
    check_content,
    decode_bytes,
    has_many_scans,
)
from starling.errors import is_out_of_memory

MIN_SIDE = 10
"""Minimum side in pixels; smaller images hold nothing to learn from."""
MAX_PIXELS = 178_956_970
"""Maximum number of pixels, half a gigabyte as RGB; larger images are refused as attacks or mistakes. Images that take
more memory to decode (16 bits a channel, JPEGs in several scans, …) have a lower limit: see image_cost.py."""

_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF")
"""Formats that Pillow may try; Pillow treats MPO as a JPEG."""
_MODES = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX"))
"""Pillow's names of the pixel modes that OpenCV decodes correctly to 8-bit RGB."""
_CONVERTED_MODES = frozenset(("CMYK", "YCbCr", "RGBa", "La"))
"""Modes that Pillow converts: OpenCV takes every CMYK image for inverted, but only Adobe's JPEGs are inverted."""
_ORIENTATION = 0x0112
_WHOLE_NUMBERS = {1: "B", 3: "H", 4: "L", 6: "b", 8: "h", 9: "l"}
"""EXIF types -> struct's letters."""
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_TURNS = {
    2: (None, 1),
    3: (cv2.ROTATE_180, None),
    4: (None, 0),
    5: (cv2.ROTATE_90_CLOCKWISE, 1),
    6: (cv2.ROTATE_90_CLOCKWISE, None),
    7: (cv2.ROTATE_90_CLOCKWISE, 0),
    8: (cv2.ROTATE_90_COUNTERCLOCKWISE, None),
}
"""EXIF orientation -> the rotation, then the flip (as cv2.flip counts axes), that make an image upright.
5 is a transposition: a quarter turn clockwise and a mirror. 7 is the other diagonal. Source: EXIF 2.3, 4.6.4."""

# MAX_PIXELS is the limit that is enforced; Pillow's own warning at half of its limit would only be noise.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# A damaged tag is either harmless or found by _checked.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


_DEEP_ROWS = 64
_ROUNDED = ((np.arange(1 << 16, dtype=np.uint32) + 128) // 257).astype(np.uint8)
"""Table that rounds 16 bits to 8."""
_CONVERT = "convert it to 8-bit RGB"
_REPLACE = "replace the image or remove it"


class UnusableImageError(DataError):
    """An image that cannot be trained on, with problem and remedy; the path is not part of the message."""

    def __init__(self, problem: str, remedy: str = _REPLACE) -> None:
        super().__init__(f"{problem}; {remedy}")
        self.problem, self.remedy = problem, remedy


def read_header(path: Path) -> ImageHeader:
    """Return the checked header of the image at `path`.

    Raises UnusableImageError with the reason: not an image, truncated, animated, pixels of 32 bits, too small
    or too large. JPEG and PNG are checked for their end mark; other formats but WebP are decoded once as a check.
    """
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            if status.st_size == 0:
                raise UnusableImageError("empty file")
            return _checked(file, *file_stamp(status))
    except IsADirectoryError:
        raise UnusableImageError("not a regular file") from None
    except OSError as error:
        raise UnusableImageError(f"cannot be read: {error.strerror or error}") from None


def file_stamp(status: os.stat_result) -> tuple[int, int]:
    """Return a file's size in bytes and the time of its last status change in nanoseconds, which users cannot set.

    The modification time would not do: archives restore it, and two versions may have equal size and modification time.
    """
    return status.st_size, status.st_ctime_ns


def decode_image(path: Path) -> np.ndarray[Any, Any]:
    """Return the image as upright RGB, uint8 [H,W,3]; transparency is dropped, 16 bits are rounded to 8.

    Raises DataError with the path if the image cannot be decoded whole; never returns a part of an image. Raises
    MemoryError with the path if memory is short, because then the image itself may be good.
    """
    try:
        content = read_regular(path, MEMORY_BYTES)
        header = _checked(io.BytesIO(content), len(content), 0)
        check_content(content, header)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check the file") from None
    except (UnusableImageError, BudgetExceeded) as error:
        rest = "" if isinstance(error, UnusableImageError) else f"; {_REPLACE}"
        raise DataError(f"{path}: {error}{rest}") from None
    height, width = header.hw
    try:
        with DECODING.taken(header.decode_bytes):
            image = _DECODERS[header.pixels](content)
            if image is None:
                raise DataError(f"{path}: cannot be decoded; {_REPLACE}")
            image = _upright(image, header)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"{path}: no room to decode its {width} x {height} pixels") from None
    if image.shape[:2] != header.hw:
        raise DataError(f"{path}: header says {header.hw}, pixels are {image.shape[:2]}; replace the image")
    return image


def _decode_plain(content: bytes) -> np.ndarray[Any, Any] | None:
    return _imdecode(content, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def _decode_deep(content: bytes) -> np.ndarray[Any, Any] | None:
    """Return 16 bits a channel rounded to 8, so that 65535 is white; OpenCV itself would drop the lower 8 bits."""
    image = _imdecode(content, cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None or image.dtype not in (np.uint8, np.uint16):
        return None
    image = image.reshape(*image.shape[:2], -1)
    rgb = np.empty((*image.shape[:2], 3), np.uint8)
    for start in range(0, len(image), _DEEP_ROWS):  # a few rows at a time, to save memory
        rows = image[start : start + _DEEP_ROWS]
        if image.shape[2] < 3:
            rows = rows[..., :1]
        rgb[start : start + _DEEP_ROWS] = (_ROUNDED[rows] if image.dtype == np.uint16 else rows)[..., 2::-1]
    return rgb


def _decode_converted(content: bytes) -> np.ndarray[Any, Any] | None:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.array(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception:  # as in _checked
        return None


_DECODERS = {"plain": _decode_plain, "deep": _decode_deep, "converted": _decode_converted}


def _imdecode(content: bytes, flags: int) -> np.ndarray[Any, Any] | None:
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error as error:
        if is_out_of_memory(error):
            raise
        return None


def _checked(file: IO[bytes], file_size: int, changed_ns: int) -> ImageHeader:
    counted = CountedFile(file)
    try:
        with Image.open(counted, formats=_FORMATS) as image:  # type: ignore[arg-type]
            width, height = image.size
            _check_size(width, height)
            if _is_animated(image):
                raise UnusableImageError("animated or of several pages", "export one frame")
            pixels, orientation = _pixels(image), _orientation(image)
            many_scans = has_many_scans(image, file, file_size)
            needed = decode_bytes(image, pixels, many_scans) + file_size
            if needed > MEMORY_BYTES:
                raise UnusableImageError(
                    f"{width} x {height} pixels need {needed >> 20} MiB to decode, over {MEMORY_BYTES >> 20}",
                    f"scale it down, or {_CONVERT}",
                )
            counted.end_of_header()
            _check_end(image, file, file_size, needed)
    except (UnusableImageError, MemoryError):
        raise
    except BudgetExceeded as error:
        raise UnusableImageError(f"its header is over the limit: {error}") from None
    except Image.DecompressionBombError:
        raise UnusableImageError(f"claims more than {MAX_PIXELS:,} pixels", "scale it down") from None
    except UnidentifiedImageError:
        raise UnusableImageError("not an image of a known format") from None
    except Exception as error:
        # Pillow's plug-ins raise many exceptions on hostile bytes (SyntaxError, struct.error, OverflowError, ...).
        raise UnusableImageError(f"corrupt: {str(error)[:200]}") from None
    if orientation >= 5:
        height, width = width, height
    return ImageHeader(
        hw=(height, width),
        orientation=orientation,
        pixels=pixels,
        many_scans=many_scans,
        decode_bytes=needed,
        file_size=file_size,
        changed_ns=changed_ns,
    )


def _is_animated(image: ImageFile.ImageFile) -> bool:
    if image.format == "TIFF":  # is_animated would read all pages of a TIFF
        try:
            image.seek(1)
        except EOFError:
            return False
        return True
    return image.format not in ("MPO", "JPEG") and bool(getattr(image, "is_animated", False))


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnusableImageError(f"claims {width} x {height} pixels, over {MAX_PIXELS:,}", "scale it down")
    if min(width, height) < MIN_SIDE:
        raise UnusableImageError(f"{width} x {height} pixels", f"each side must have {MIN_SIDE} or more")


def _pixels(image: ImageFile.ImageFile) -> Literal["plain", "deep", "converted"]:
    if image.mode.startswith("I;16") or ";16" in str(image.tile):
        return "deep"
    if image.format == "TIFF" and "A" in image.mode:
        return "converted"  # OpenCV multiplies the colours of a TIFF by its transparency
    if image.mode in _MODES:
        return "plain"
    if image.mode in _CONVERTED_MODES:
        return "converted"
    raise UnusableImageError(f"pixels of mode {image.mode}", _CONVERT)


def _orientation(image: Image.Image) -> int:
    # Pillow would decode a whole PNG to find EXIF after its pixels. OpenCV and Pillow rotate a TIFF
    # themselves.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    exif = image.info.get("exif")
    found = _exif_orientation(exif) if isinstance(exif, bytes) else None
    if found is None:
        xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
        match = _XMP_ORIENTATION.search(xmp.encode("utf-8", "replace") if isinstance(xmp, str) else xmp)
        found = int(match[1]) if match else 1
    return found if 1 <= found <= 8 else 1


def _exif_orientation(exif: bytes) -> int | None:
    """Return the orientation in the first directory of EXIF data; None if the directory has none.

    Pillow would read every value of the directory: the values of a few kilobytes can claim gigabytes.
    """
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or len(exif) < 8:
        return None
    (start,) = struct.unpack_from(f"{order}L", exif, 4)
    (count,) = struct.unpack_from(f"{order}H", exif, start) if start + 2 <= len(exif) else (0,)
    for at in range(start + 2, min(start + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind = struct.unpack_from(f"{order}2H", exif, at)
        if tag == _ORIENTATION and kind in _WHOLE_NUMBERS:
            (value,) = struct.unpack_from(order + _WHOLE_NUMBERS[kind], exif, at + 8)
            return int(value)
    return None


def _check_end(image: Image.Image, file: IO[bytes], file_size: int, needed: int) -> None:
    """Refuse a truncated image; decode the image only if its last bytes do not show whether it is complete."""
    position = file.tell()
    file.seek(max(file_size - 32, 0))
    tail = file.read(32)
    file.seek(position)
    if image.format in ("JPEG", "MPO") and tail.rstrip(b"\0").endswith(b"\xff\xd9"):
        return
    if image.format == "PNG" and b"IEND" in tail:
        return
    if image.format == "WEBP":
        file.seek(4)
        if int.from_bytes(file.read(4), "little") + 8 > file_size:
            raise UnusableImageError("truncated")
        return
    try:
        with DECODING.taken(needed):
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise UnusableImageError(f"truncated or corrupt: {error}") from None


def _upright(image: np.ndarray[Any, Any], header: ImageHeader) -> np.ndarray[Any, Any]:
    rotation, flip = _TURNS.get(header.orientation, (None, None))
    if rotation is not None:
        image = cv2.rotate(image, rotation)
    return image if flip is None else cv2.flip(image, flip)
