"""The cost of decoding an image, estimated from its header: memory by format, time by the scans of a JPEG."""

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
"""Peak bytes per pixel while OpenCV decodes to 8-bit RGB, by Pillow's name of the format: the pixels, their copy in RGB
order, and the memory of the format's decoder. Measured at 36 megapixels, rounded up."""
_PER_PIXEL_CONVERTED = 15
"""Peak bytes per pixel of images that Pillow converts: four bytes before and after, and three in each of two copies."""
_PER_PIXEL_OF_SCANS = 10
"""Peak bytes per pixel of a JPEG in several scans: the decoder keeps two bytes per coefficient until the last scan."""
_PIXELS_OF_SCANS = 2_000_000_000
"""Limit of pixels times scans of a JPEG; one scan takes up to 6 ns per pixel. Real files have up to 14 scans."""
_SCAN_BYTES = 12
"""Minimum size in bytes of a scan in the file."""
_HEADER_BYTES = 64 << 20
_EXIF_BYTES = 1 << 16
"""Maximum bytes of EXIF, one JPEG segment. The values of an EXIF directory may refer to the same bytes repeatedly."""
_PNG = b"\x89PNG\r\n\x1a\n"
_MARKER = 4
"""Size in bytes of a marker or a length field."""
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_TILE_PIXEL = 16
"""Bytes per pixel of a TIFF tile; a tile may be larger than the image."""
_SMALL = 64 << 20
"""Images that need less memory are decoded without waiting for other threads."""


def decode_bytes(image: ImageFile.ImageFile, pixels: str, many_scans: bool) -> int:
    """Return the maximum memory in bytes that decoding takes, without the bytes of the file."""
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
        # OpenCV holds 16-bit pixels twice while it reorders the channels; then the result is three channels of 8 bits.
        return strip + max(4 * channels, 2 * channels + 3) + 0.5
    if many_scans:
        return _PER_PIXEL_OF_SCANS
    return _PER_PIXEL.get(image.format or "", 16)


def has_many_scans(image: ImageFile.ImageFile, file: IO[bytes], file_size: int) -> bool:
    """Return whether a JPEG stores its pixels in several scans: it is progressive, or its first scan lacks a component.

    A file too small for scans to matter counts as a file with one scan.
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
    """Raise BudgetExceeded for excessive time or memory that the header does not reveal, only the whole file."""
    if header.many_scans:
        scans, (height, width) = content.count(b"\xff\xda"), header.hw
        if scans * height * width > _PIXELS_OF_SCANS:
            raise BudgetExceeded(
                f"{scans} scans of {width} x {height} pixels take more than {SECONDS:g} s to decode"
            )
    if content.startswith(_PNG):
        _check_chunks(content)


def _check_chunks(content: bytes) -> None:
    """Refuse a PNG with a chunk longer than the file: OpenCV allocates the memory before it checks the length."""
    at = len(_PNG)
    while at + 8 <= len(content):
        length, kind = struct.unpack_from(">L4s", content, at)
        if kind == b"IEND":
            return
        at += 12 + length
        if at > len(content):
            raise BudgetExceeded(f"a chunk claims {length:,} bytes, more than the file has")


class CountedFile:
    """The file object that Pillow reads a header from: counts all bytes read, repeated reads included.

    Raises BudgetExceeded if the values of a directory refer to the same bytes again and again.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._read = file, file.read
        self._left = _HEADER_BYTES
        self._exif = Budget(exif_bytes=_EXIF_BYTES)
        self._counts = True
        self.seek, self.tell = file.seek, file.tell  # attributes, not methods: Pillow calls them often

    def read(self, size: int = -1) -> bytes:
        """Read from the file, and count the bytes."""
        content = self._read(size)
        if self._counts and not 0 <= size <= _MARKER:  # a header has many markers and lengths
            self._left -= len(content)
            if self._left < 0:
                raise BudgetExceeded(f"more than {_HEADER_BYTES >> 20} MiB of header")
            if content.startswith(b"Exif\0"):
                self._exif.spend(exif_bytes=len(content))
        return content

    def end_of_header(self) -> None:
        """Stop counting before the pixels are read."""
        self._counts = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Room:
    """A memory limit that threads share; a thread that needs more than the free part waits for the others."""

    def __init__(self, most: int) -> None:
        self._most, self._taken = most, 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Reserve `count` bytes inside the block."""
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
"""The memory that all threads of this process may use together to decode large images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageHeader:
    """The properties of an image file that are known before decoding."""

    hw: Size
    """Height and width in pixels after the EXIF rotation."""
    orientation: int
    """EXIF orientation, 1 (upright) to 8."""
    pixels: Literal["plain", "deep", "converted"]
    """How the pixels become RGB: decoded by OpenCV, reduced from 16 bits a channel, or converted by Pillow."""
    many_scans: bool
    """Whether the file is a JPEG with several scans; each scan takes time."""
    decode_bytes: int
    """Maximum memory in bytes that decoding takes, the bytes of the file included."""
    file_size: int
    """Size of the file in bytes."""
    changed_ns: int
    """Time of the file's last change in nanoseconds of the file system's clock; see `file_stamp`."""
