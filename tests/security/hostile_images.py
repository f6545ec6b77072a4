"""Images that nobody made in good faith, small on disk."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image


def saved(mode: str, side: int, form: str, **options: Any) -> bytes:
    """Return a black image as a file."""
    target = io.BytesIO()
    Image.new(mode, (side, side)).save(target, form, **options)
    return target.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(side: int, bits: int, colour: int, *, interlaced: bool = False, extra: bytes = b"") -> bytes:
    """Return a black PNG of any depth and colour type."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [
            (0, 0, 8, 8),
            (4, 0, 8, 8),
            (0, 4, 4, 8),
            (2, 0, 4, 4),
            (0, 2, 2, 4),
            (1, 0, 2, 2),
            (0, 1, 1, 2),
        ]
    size = 0
    for left, top, across, down in passes:
        width, height = -(-(side - left) // across), -(-(side - top) // down)
        size += height * (1 + (width * bits * channels + 7) // 8)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, bits, colour, 0, 0, int(interlaced)))
    palette = chunk(b"PLTE", bytes(range(256)) * 3) if colour == 3 else b""
    body = chunk(b"IDAT", zlib.compress(bytes(size), 1))
    return b"\x89PNG\r\n\x1a\n" + head + palette + extra + body + chunk(b"IEND", b"")


def tiff(*entries: tuple[int, int, int, int], side: int = 100, tail: bytes = b"") -> bytes:
    """Return a little-endian TIFF of one uncompressed grey strip, with more entries (tag, type, count, value)."""
    known = [(256, 3, 1, side), (257, 3, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    known += [(277, 3, 1, 1)] + ([] if any(e[0] == 322 for e in entries) else [(278, 3, 1, side)])
    offset = 8 + 2 + 12 * (len(known) + len(entries) + 2) + 4
    known += [(273, 4, 1, offset), (279, 4, 1, side * side)]
    rows = b"".join(struct.pack("<HHLL", *entry) for entry in sorted([*known, *entries]))
    head = b"II*\0" + struct.pack("<LH", 8, len(known) + len(entries))
    return head + rows + bytes(4) + bytes(side * side) + tail


def directory_bomb(size: int = 1 << 20) -> bytes:
    """Return EXIF data whose 60,000 entries all claim the same bytes."""
    count = 60_000
    rows = b"".join(struct.pack("<HHLL", 1000 + n, 7, size, 8) for n in range(count))
    return b"II*\0" + struct.pack("<LH", 8, count) + rows + bytes(max(size - len(rows), 0) + 16)


def jpeg_with(segments: list[bytes]) -> bytes:
    """Return a JPEG with segments APP1 in front, and no density, for which Pillow asks the EXIF."""
    whole = saved("RGB", 64, "JPEG")
    at = whole.index(b"\xff\xdb")
    return (
        b"\xff\xd8" + b"".join(b"\xff\xe1" + struct.pack(">H", len(s) + 2) + s for s in segments) + whole[at:]
    )


def exif_bomb_jpeg(piece: int = 60_000) -> bytes:
    """Return a JPEG whose EXIF comes in segments that together are a directory bomb."""
    bomb = directory_bomb()
    return jpeg_with([b"Exif\0\0" + bomb[at : at + piece] for at in range(0, len(bomb), piece)])


def scans_jpeg(scans: int, side: int) -> bytes:
    """Return a progressive JPEG whose last scan is repeated."""
    whole = saved("RGB", side, "JPEG", progressive=True)
    at = whole.rindex(b"\xff\xda")
    return whole[:at] + whole[at:-2] * scans + b"\xff\xd9"


def page_chain(pages: int) -> bytes:
    """Return a TIFF of very many pages, each of an empty directory."""
    whole = bytearray(tiff())
    start = len(whole)
    at = 8 + 2 + 12 * struct.unpack_from("<H", whole, 8)[0]
    struct.pack_into("<L", whole, at, start)
    links = b"".join(struct.pack("<HL", 0, start + 6 * (n + 1)) for n in range(pages))
    return bytes(whole) + links + bytes(6)


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "exif-bomb.jpg": (exif_bomb_jpeg, "MiB of exif"),
    "exif-crumbs.jpg": (lambda: exif_bomb_jpeg(9)[: 4 << 20] + b"\xff\xd9", "MiB of exif|corrupt|truncated"),
    "exif-bomb.tif": (lambda: tiff(*((2000 + n, 7, 1 << 20, 8) for n in range(5000)), tail=bytes(1 << 20)), ""),
    "tile-bomb.tif": (lambda: tiff((322, 4, 1, 30_000), (323, 4, 1, 30_000), (324, 4, 1, 8), (325, 4, 1, 9)), "MiB to decode"),
    "page-chain.tif": (lambda: page_chain(300_000), "several pages|corrupt"),
    "scans.jpg": (lambda: scans_jpeg(3000, 1024), "scans"),
    "deep.png": (lambda: png(9_500, 16, 2), "MiB to decode"),
    "text-bomb.png": (lambda: png(20, 8, 0, extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50 << 20)))), ""),
    "profile-bomb.png": (lambda: png(20, 8, 0, extra=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(50 << 20)))), ""),
    "claims.jpg": (lambda: saved("RGB", 16, "JPEG").replace(b"\0\x10\0\x10", b"\xff\xff\xff\xff", 1), ""),
    "claims.webp": (lambda: saved("RGB", 16, "WEBP")[:4] + b"\xff" * 4 + saved("RGB", 16, "WEBP")[8:], "truncated|corrupt"),
    "chunk.png": (lambda: _chunk_that_claims(0x7F00_0000), "a chunk claims"),
    "rle.bmp": (lambda: _rle_bmp(20_000), "pixels|corrupt|MiB"),
}  # fmt: skip
"""Name -> what builds the image, and what the message says; empty where the image may be taken or refused."""


def _chunk_that_claims(length: int) -> bytes:
    """Return a PNG whose pixels' chunk claims this length; OpenCV 5.0 takes as much memory, and 13 s for 2 GB."""
    whole = png(20, 8, 0)
    at = whole.index(b"IDAT") - 4
    return whole[:at] + struct.pack(">L", length) + whole[at + 4 :]


def _rle_bmp(side: int) -> bytes:
    head = struct.pack("<LllHHLLllLL", 40, side, side, 1, 8, 1, 0, 0, 0, 256, 0)
    rows = (b"\xff\0" * (side // 255) + b"\0\0") * 10
    return b"BM" + struct.pack("<LLL", 0, 0, 14 + 40 + 1024) + head + bytes(1024) + rows + b"\0\1"


LARGEST: dict[str, tuple[float, Callable[[int], bytes]]] = {
    "plain.png": (6.6, lambda side: png(side, 8, 2)),
    "interlaced.png": (6.6, lambda side: png(side, 8, 6, interlaced=True)),
    "grey16.png": (5.6, lambda side: png(side, 16, 0)),
    "rgb16.png": (12.7, lambda side: png(side, 16, 2)),
    "rgba16.png": (16.8, lambda side: png(side, 16, 6, interlaced=True)),
    "progressive.jpg": (10.1, lambda side: saved("RGB", side, "JPEG", progressive=True, subsampling=0)),
    "baseline.jpg": (10.1, lambda side: saved("RGB", side, "JPEG", subsampling=0)),
    "inks.jpg": (15.2, lambda side: saved("CMYK", side, "JPEG")),
    "strips.tif": (11.2, lambda side: saved("RGB", side, "TIFF", compression="tiff_lzw")),
    "plain.tif": (14.2, lambda side: saved("RGB", side, "TIFF")),
    "transparent.tif": (15.2, lambda side: saved("RGBA", side, "TIFF", compression="tiff_lzw")),
    "lossless.webp": (8.1, lambda side: saved("RGBA", side, "WEBP", lossless=True)),
    "24.bmp": (10.6, lambda side: saved("RGB", side, "BMP")),
    "p.gif": (9.1, lambda side: saved("P", side, "GIF")),
}
"""Name -> bytes that decoding takes for a pixel, the file's own included, and what builds the image of a side."""
