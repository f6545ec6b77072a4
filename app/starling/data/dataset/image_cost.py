"""What decoding an image costs, known from its header: memory by format, time by the scans of a JPEG."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Literal

from PIL import ImageFile

from starling.core.budget import MEMORY_BYTES, SECONDS, Budget, BudgetExceeded
from starling.data.augment.letterbox import Size

_PER_PIXEL = {"JPEG": 6.5, "MPO": 6.5, "PNG": 6.5, "BMP": 7.5, "GIF": 9.0, "WEBP": 8.0, "TIFF": 11.0}
"""Bytes a pixel at the peak, by Pillow's name of the format, for what OpenCV decodes to 8-bit RGB: the pixels, their
copy in the order RGB, and what the format's decoder holds. Measured at 36 megapixels, rounded up."""
_PER_PIXEL_CONVERTED = 15
"""What Pillow converts: four bytes a pixel before and after, and three in two copies."""
_PER_PIXEL_OF_SCANS = 10
"""A JPEG in several scans keeps two bytes a coefficient until the last scan."""
_PIXELS_OF_SCANS = 2_000_000_000
"""Pixels times scans of a JPEG; one scan takes up to 6 ns a pixel. Real files have up to 14 scans."""
_SCAN_BYTES = 12
"""The least that a scan takes in the file."""
_HEADER_BYTES = 64 << 20
_EXIF_BYTES = 1 << 16
"""One segment of a JPEG. Pillow reads all values of the directory, which may claim the same bytes again and again."""
_PNG = b"\x89PNG\r\n\x1a\n"
_MARKER = 4
"""Bytes of a mark or a length."""
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_TILE_PIXEL = 16
"""Bytes for each pixel of a TIFF's tile, which may be larger than the image."""
_SMALL = 64 << 20
"""Decoding that takes less waits for nobody."""


def decode_bytes(image: ImageFile.ImageFile, pixels: str, many_scans: bool) -> int:
    """Return the most bytes that decoding takes, beside the file's own."""
    width, height = image.size
    tile = 0
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        tile = _TILE_PIXEL * int(tags.get(_TILE_WIDTH, 0)) * int(tags.get(_TILE_LENGTH, 0))
    return int(width * height * _bytes_per_pixel(image, pixels, many_scans)) + tile


def _bytes_per_pixel(image: ImageFile.ImageFile, pixels: str, many_scans: bool) -> float:
    if pixels == "converted":
        return _PER_PIXEL_CONVERTED
    if pixels == "deep":
        channels = 4 if "A" in image.mode else len(image.getbands())
        strip = 2 * channels if image.format == "TIFF" else 0
        # OpenCV holds them twice while it changes their order; then they become three of 8 bits.
        return strip + max(4 * channels, 2 * channels + 3) + 0.5
    if many_scans:
        return _PER_PIXEL_OF_SCANS
    return _PER_PIXEL.get(image.format or "", 16)


def has_many_scans(image: ImageFile.ImageFile, file: IO[bytes], file_size: int) -> bool:
    """Return whether a JPEG's pixels come in several scans: it is progressive, or its first scan lacks a component.

    A file so small that its scans do not matter counts as one of a single scan.
    """
    if image.format not in ("JPEG", "MPO"):
        return False
    if image.width * image.height * (file_size // _SCAN_BYTES) <= _PIXELS_OF_SCANS:
        return False
    if image.info.get("progressive"):
        return True
    components = len(image.getbands())
    length = 6 + 2 * components
    position = file.tell()
    file.seek(max(position - length - 2, 0))
    head = file.read(5)
    file.seek(position)
    return head != b"\xff\xda" + length.to_bytes(2, "big") + bytes([components])


def check_content(content: bytes, header: ImageHeader) -> None:
    """Raise BudgetExceeded for what would take too long or too much memory, which only the whole file shows."""
    if header.many_scans:
        scans, (height, width) = content.count(b"\xff\xda"), header.hw
        if scans * height * width > _PIXELS_OF_SCANS:
            raise BudgetExceeded(
                f"{scans} scans of {width} x {height} pixels take more than {SECONDS:g} s to decode"
            )
    if content.startswith(_PNG):
        _check_chunks(content)


def _check_chunks(content: bytes) -> None:
    """Refuse a PNG with a chunk that claims more bytes than there are: OpenCV takes the memory before it looks."""
    at = len(_PNG)
    while at + 8 <= len(content):
        length, kind = struct.unpack_from(">L4s", content, at)
        if kind == b"IEND":
            return
        at += 12 + length
        if at > len(content):
            raise BudgetExceeded(f"a chunk claims {length:,} bytes, more than the file has")


class CountedFile:
    """A file as Pillow sees it while it reads a header: what is read, and read again, is counted.

    Raises BudgetExceeded for a directory whose values claim the same bytes again and again.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._read = file, file.read
        self._left = _HEADER_BYTES
        self._exif = Budget(exif_bytes=_EXIF_BYTES)
        self._counts = True
        self.seek, self.tell = file.seek, file.tell  # Pillow asks for them often

    def read(self, size: int = -1) -> bytes:
        """Read as the file does."""
        content = self._read(size)
        if self._counts and not 0 <= size <= _MARKER:  # of which a header has many
            self._left -= len(content)
            if self._left < 0:
                raise BudgetExceeded(f"more than {_HEADER_BYTES >> 20} MiB of header")
            if content.startswith(b"Exif\0"):
                self._exif.spend(exif_bytes=len(content))
        return content

    def end_of_header(self) -> None:
        """Stop counting: the pixels are read now."""
        self._counts = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Room:
    """The memory that threads may take together; one that needs more than is left waits for the others."""

    def __init__(self, most: int) -> None:
        self._most, self._taken = most, 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Hold `count` bytes inside the block."""
        if count < _SMALL:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + count <= self._most)
            self._taken += count
        try:
            yield
        finally:
            with self._changed:
                self._taken -= count
                self._changed.notify_all()


DECODING = Room(MEMORY_BYTES)
"""What all threads of this process may take to decode large images at the same time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageHeader:
    """What an image's file says before it is decoded."""

    hw: Size
    """Height and width in pixels after the EXIF rotation."""
    orientation: int
    """EXIF orientation, 1 (upright) to 8."""
    pixels: Literal["plain", "deep", "converted"]
    """How the pixels become RGB: by OpenCV, from 16 bits a channel, or by Pillow."""
    many_scans: bool
    """Whether it is a JPEG whose pixels come in several scans, each of which takes time."""
    decode_bytes: int
    """The most memory that decoding takes, the file's bytes included."""
    file_size: int
    """Bytes on disk."""
    changed_ns: int
    """When the file last changed, in nanoseconds of the file system's clock; see `file_stamp`."""
