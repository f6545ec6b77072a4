"""What an image file says before it is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from starling.data.augment.letterbox import Size


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageHeader:
    """What a picture's file says before it is decoded."""

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
