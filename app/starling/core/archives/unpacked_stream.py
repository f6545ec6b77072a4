"""Unpack a gzip, bzip2 or xz file as a stream in bounded memory, and count the unpacked bytes."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any

CHUNK = 1 << 20
"""Bytes read or unpacked at once."""
DICTIONARY_BYTES = 256 << 20
"""The most memory that an xz file may need; `xz -9` needs 65 MiB."""


class DamagedArchive(Exception):
    """An archive is truncated, damaged, or made to mislead; the message is the reason only."""


class _Gunzip:
    """zlib's decompressor for gzip, with the interface of the decompressors of bz2 and lzma."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(16 + zlib.MAX_WBITS)
        self.needs_input = True

    def decompress(self, data: bytes, max_length: int) -> bytes:
        content = self._inflate.decompress(self._inflate.unconsumed_tail + data, max_length)
        # zlib may have consumed all input and still hold unpacked data.
        self.needs_input = len(content) < max_length and not self._inflate.unconsumed_tail
        return content

    @property
    def eof(self) -> bool:
        return self._inflate.eof

    @property
    def unused_data(self) -> bytes:
        return self._inflate.unused_data


def _xz() -> Any:
    return lzma.LZMADecompressor(lzma.FORMAT_AUTO, memlimit=DICTIONARY_BYTES)


_KINDS: dict[bytes, Callable[[], Any]] = {
    b"\x1f\x8b": _Gunzip,
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\0": _xz,
    b"\x5d\0\0": _xz,
}


def unpacked(file: IO[bytes], count: Callable[[int], None]) -> IO[bytes]:
    """Return the unpacked stream of `file`, or `file` itself if it is not packed.

    `count` is called with the number of unpacked bytes before they are returned, and may raise. Reading the stream
    raises DamagedArchive if the file is truncated or damaged, or needs a dictionary of over DICTIONARY_BYTES.
    """
    head = file.read(6)
    file.seek(0)
    for magic, make in _KINDS.items():
        if head.startswith(magic):
            return io.BufferedReader(_Unpacked(file, make, count), CHUNK)
    return file


class _Unpacked(io.RawIOBase):
    def __init__(self, file: IO[bytes], make: Callable[[], Any], count: Callable[[int], None]) -> None:
        self._file, self._make, self._count = file, make, count
        self._unpack = make()
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Unpack into the buffer, and return the number of bytes; 0 at the end."""
        while True:
            if self._unpack.eof and not self._next_member():
                return 0
            packed, self._rest = self._rest, b""
            if not packed and self._unpack.needs_input and not (packed := self._file.read(CHUNK)):
                raise DamagedArchive("it ends too early")
            content = _decompress(self._unpack, packed, len(buffer))
            if content:
                self._count(len(content))
                buffer[: len(content)] = content
                return len(content)

    def _next_member(self) -> bool:
        """Start the next packed stream after one has ended, past zero padding; return False at the end of the file."""
        self._rest = self._unpack.unused_data or self._file.read(CHUNK)
        while self._rest and not self._rest.strip(b"\0"):
            self._rest = self._file.read(CHUNK)
        self._rest = self._rest.lstrip(b"\0")
        if self._rest:
            self._unpack = self._make()
        return bool(self._rest)


def _decompress(unpack: Any, packed: bytes, most: int) -> bytes:
    """Return the next bytes of a decompressor, at most `most`; raises DamagedArchive."""
    try:
        content: bytes = unpack.decompress(packed, most)
    except (zlib.error, lzma.LZMAError, OSError, ValueError, EOFError) as error:
        raise DamagedArchive(_reason(error)) from None
    return content


def is_packed(head: bytes) -> bool:
    """Return whether a file that begins with `head` is packed by gzip, bzip2 or xz."""
    return any(head.startswith(magic) for magic in _KINDS)


def _reason(error: Exception) -> str:
    if isinstance(error, lzma.LZMAError) and "limit" in str(error).lower():
        return f"it needs over {DICTIONARY_BYTES >> 20} MiB of memory to unpack"
    return str(error) or type(error).__name__
