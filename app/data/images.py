"""Pictures on disk: look at the header first, refuse what cannot be used, decode to upright RGB.

The header is read with Pillow, which allocates nothing for the pixels, so that a tiny file that claims
50,000 x 50,000 pixels is refused before anything is decoded. Users' files are only ever read.
"""

from __future__ import annotations

import io
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from app.data.letterbox import Size
from app.errors import DataError

IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp"))
MIN_SIDE = 10
"""Pictures with a shorter side hold nothing to learn from."""
MAX_PIXELS = 178_956_970
"""Half a gigabyte as RGB; larger pictures are taken for attacks or mistakes."""

_MODES = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX"))
_ORIENTATION = 0x0112
_TURNS = {
    2: (None, 1),
    3: (cv2.ROTATE_180, None),
    4: (None, 0),
    5: (cv2.ROTATE_90_CLOCKWISE, 1),
    6: (cv2.ROTATE_90_CLOCKWISE, None),
    7: (cv2.ROTATE_90_CLOCKWISE, 0),
    8: (cv2.ROTATE_90_COUNTERCLOCKWISE, None),
}
"""EXIF orientation -> the rotation, then the flip (as cv2.flip counts axes), that make a picture upright.
5 is a transposition: a quarter turn clockwise and a mirror. 7 is the other diagonal. Source: EXIF 2.3, 4.6.4."""

# The limit above is the one that counts; Pillow's own warning at half of it would only be noise.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnusableImageError(DataError):
    """A picture that cannot be trained on; the message is the reason, without the path."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageHeader:
    """What a picture's file says before it is decoded."""

    hw: Size
    """Height and width in pixels after the EXIF rotation."""
    orientation: int
    """EXIF orientation, 1 (upright) to 8."""
    file_size: int
    """Bytes on disk."""
    modified_ns: int
    """Time of the last change, in nanoseconds of the file system's clock."""


def read_header(path: Path) -> ImageHeader:
    """Return the checked header of the picture at `path`.

    Raises UnusableImageError with the reason: not a picture, truncated, animated, CMYK, 16 bit, too small or
    too large. Truncation is seen by the end mark of JPEG and PNG; other formats are decoded once to know.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnusableImageError("not a regular file")
        if status.st_size == 0:
            raise UnusableImageError("empty file")
        with open(path, "rb") as file:
            return _checked(file, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise UnusableImageError(f"cannot be read: {error.strerror or error}") from None


def decode_image(path: Path) -> np.ndarray[Any, Any]:
    """Return the picture as upright RGB, uint8 [H,W,3].

    Raises DataError naming the path when it cannot be decoded whole; never returns a part of a picture.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check the file") from None
    try:
        header = _checked(io.BytesIO(content), len(content), 0)
    except UnusableImageError as error:
        raise DataError(f"{path}: {error}; replace the picture or remove it") from None
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:
        image = None
    if image is None:
        raise DataError(f"{path}: cannot be decoded; replace the picture or remove it")
    image = _upright(image, header)
    if image.shape[:2] != header.hw:
        raise DataError(f"{path}: header says {header.hw}, pixels are {image.shape[:2]}; replace the picture")
    return image


def _checked(file: IO[bytes], file_size: int, modified_ns: int) -> ImageHeader:
    try:
        with Image.open(file) as image:
            width, height = image.size
            _check_size(width, height)
            if image.format not in ("MPO", "JPEG") and getattr(image, "is_animated", False):
                raise UnusableImageError("animated or of several pages; export one frame")
            if image.mode not in _MODES or ";16" in str(image.tile):
                raise UnusableImageError(f"{_describe(image)} pixels; convert it to 8-bit RGB")
            orientation = _orientation(image)
            _check_end(image, file, file_size)
    except UnusableImageError:
        raise
    except Image.DecompressionBombError:
        raise UnusableImageError(f"claims more than {MAX_PIXELS:,} pixels; scale it down") from None
    except UnidentifiedImageError:
        raise UnusableImageError("not a picture of a known format") from None
    except Exception as error:
        # Pillow's plug-ins raise many kinds on hostile bytes (SyntaxError, struct.error, OverflowError, ...).
        raise UnusableImageError(f"corrupt: {error}") from None
    if orientation >= 5:
        height, width = width, height
    return ImageHeader(
        hw=(height, width), orientation=orientation, file_size=file_size, modified_ns=modified_ns
    )


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnusableImageError(f"claims {width} x {height} pixels, over {MAX_PIXELS:,}; scale it down")
    if min(width, height) < MIN_SIDE:
        raise UnusableImageError(f"{width} x {height} pixels; each side must have {MIN_SIDE} or more")


def _describe(image: Image.Image) -> str:
    return image.mode if image.mode == "CMYK" else f"16-bit or {image.mode}"


def _orientation(image: Image.Image) -> int:
    # Asking a PNG for EXIF that does not stand before its pixels would decode it whole; and OpenCV turns a
    # TIFF by itself, as does Pillow.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    value = image.getexif().get(_ORIENTATION, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _check_end(image: Image.Image, file: IO[bytes], file_size: int) -> None:
    """Refuse a truncated picture, decoding it only where the last bytes do not settle the question."""
    position = file.tell()
    file.seek(max(file_size - 32, 0))
    tail = file.read(32)
    file.seek(position)
    if image.format in ("JPEG", "MPO") and tail.rstrip(b"\0").endswith(b"\xff\xd9"):
        return
    if image.format == "PNG" and b"IEND" in tail:
        return
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise UnusableImageError(f"truncated or corrupt: {error}") from None


def _upright(image: np.ndarray[Any, Any], header: ImageHeader) -> np.ndarray[Any, Any]:
    rotation, flip = _TURNS.get(header.orientation, (None, None))
    if rotation is not None:
        image = cv2.rotate(image, rotation)
    return image if flip is None else cv2.flip(image, flip)
