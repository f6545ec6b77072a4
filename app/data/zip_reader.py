"""Read a zip file that nobody vouches for, entry by entry: the directory is never held whole, lies are found out.

Source: PKWARE, APPNOTE.TXT 6.3.10, 4.3 and 4.5.3.
"""

from __future__ import annotations

import bz2
import lzma
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from app.core.unpacked_stream import CHUNK, DICTIONARY_BYTES, DamagedArchive, Inflate, decompress

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s4B4HL2L5H2L")
_LOCAL = struct.Struct("<4s2B4HL2L2H")
_MOST_COMMENT = 0xFFFF
_SATURATED = 0xFFFF_FFFF
_STORED, _DEFLATED, _BZIP2, _LZMA = 0, 8, 12, 14
_ENCRYPTED, _UTF8 = 1, 0x800


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """What the directory says of one entry."""

    name: str
    encrypted: bool
    method: int
    crc: int
    packed: int
    size: int
    offset: int
    kind: int
    """Type bits of its mode, 0 where none are given."""

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder, by its name."""
        return self.name.endswith("/")


class ZipReader:
    """The entries of a zip file; every method raises DamagedArchive for what is cut, damaged or a lie."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._file_size = file.seek(0, os.SEEK_END)
        self._start, self._length, self._shift = self._directory()

    def entries(self) -> Iterator[ZipEntry]:
        """Yield the entries in the directory's order; what they claim is checked against the file's size."""
        position, end, claimed = self._start, self._start + self._length, 0
        while position < end:
            fixed = self._at(position, _ENTRY.size)
            values = _ENTRY.unpack(fixed)
            if values[0] != b"PK\1\2":
                raise DamagedArchive("its directory is damaged")
            name_size, extra_size, comment_size = values[12:15]
            rest = self._at(position + _ENTRY.size, name_size + extra_size)
            position += _ENTRY.size + name_size + extra_size + comment_size
            entry = _entry(values, rest[:name_size], rest[name_size:])
            claimed += entry.packed + _LOCAL.size + name_size
            if claimed > self._file_size:
                raise DamagedArchive("its entries overlap or claim more bytes than it has")
            yield entry
        if position != end:
            raise DamagedArchive("its directory is damaged")

    def chunks(self, entry: ZipEntry) -> Iterator[bytes]:
        """Yield the content of an entry, checked against its size and checksum."""
        size = crc = 0
        for chunk in self._unpacked(entry):
            size += len(chunk)
            if size > entry.size:
                raise DamagedArchive(f"{entry.name!r} holds more than the {entry.size} bytes it claims")
            crc = zlib.crc32(chunk, crc)
            yield chunk
        if size != entry.size or crc != entry.crc:
            raise DamagedArchive(f"{entry.name!r} is not what its checksum says")

    def _unpacked(self, entry: ZipEntry) -> Iterator[bytes]:
        position, left = self._data_of(entry), entry.packed
        unpack: Any = None
        if entry.method == _DEFLATED:
            unpack = Inflate(-zlib.MAX_WBITS)
        elif entry.method == _BZIP2:
            unpack = bz2.BZ2Decompressor()
        elif entry.method == _LZMA:
            unpack, used = self._lzma(position, left)
            position, left = position + used, left - used
        elif entry.method != _STORED:
            raise DamagedArchive(f"{entry.name!r} is packed by method {entry.method}, which is not read")
        while left:
            packed = self._at(position, min(left, CHUNK))
            position, left = position + len(packed), left - len(packed)
            yield from (packed,) if unpack is None else _inflated(unpack, packed)

    def _data_of(self, entry: ZipEntry) -> int:
        """Return where an entry's content begins."""
        offset = entry.offset + self._shift
        values = _LOCAL.unpack(self._at(offset, _LOCAL.size))
        if values[0] != b"PK\3\4":
            raise DamagedArchive(f"{entry.name!r} is not where the directory says")
        return int(offset + _LOCAL.size + values[10] + values[11])

    def _lzma(self, position: int, left: int) -> tuple[Any, int]:
        """Return a decompressor by the properties that stand before LZMA's content, and their bytes."""
        _, length = struct.unpack("<2H", self._at(position, 4))
        properties = self._at(position + 4, length)
        if length != 5 or left < 9 or properties[0] >= 9 * 5 * 5:
            raise DamagedArchive("the properties of an LZMA entry are damaged")
        dictionary = int.from_bytes(properties[1:5], "little")
        if dictionary > DICTIONARY_BYTES:
            raise DamagedArchive(f"it needs over {DICTIONARY_BYTES >> 20} MiB of memory to unpack")
        rest, lc = divmod(properties[0], 9)
        pb, lp = divmod(rest, 5)
        one = {"id": lzma.FILTER_LZMA1, "dict_size": max(dictionary, 4096), "lc": lc, "lp": lp, "pb": pb}
        return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[one]), 4 + length

    def _directory(self) -> tuple[int, int, int]:
        """Return start and length of the directory, and what to add to every offset for bytes before the archive."""
        tail_at = max(self._file_size - _END.size - _MOST_COMMENT, 0)
        tail = self._at(tail_at, self._file_size - tail_at)
        found = tail.rfind(b"PK\5\6")
        while found >= 0 and not _is_end(tail, found):
            found = tail.rfind(b"PK\5\6", 0, found)
        if found < 0:
            raise DamagedArchive("its end is missing, so it is cut")
        *_, length, offset, _ = _END.unpack_from(tail, found)
        end = tail_at + found
        locator = end - _LOCATOR64.size
        if locator >= 0:
            signature, _, at, _ = _LOCATOR64.unpack(self._at(locator, _LOCATOR64.size))
            if signature == b"PK\6\7":
                end = locator - _END64.size  # one without extensible data, the only kind that is written
                signature, *_, length, offset = _END64.unpack(self._at(min(at, end), _END64.size))
                if signature != b"PK\6\6":
                    raise DamagedArchive("its end is damaged")
        start = end - length
        if start < 0 or start < offset:
            raise DamagedArchive("its directory lies outside it")
        return start, length, start - offset

    def _at(self, position: int, size: int) -> bytes:
        if position < 0 or position + size > self._file_size:
            raise DamagedArchive("it points outside itself, so it is cut or damaged")
        self._file.seek(position)
        content = self._file.read(size)
        if len(content) != size:
            raise DamagedArchive("it ends too early")
        return content


def is_zip(file: IO[bytes]) -> bool:
    """Return whether a file begins or ends as a zip file."""
    file.seek(0)
    if file.read(4) in (b"PK\3\4", b"PK\5\6"):
        return True
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _END.size - _MOST_COMMENT, 0))
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    return at >= 0 and _is_end(tail, at)


def _is_end(tail: bytes, at: int) -> bool:
    return len(tail) >= at + _END.size and at + _END.size + _END.unpack_from(tail, at)[-1] <= len(tail)


def _entry(values: tuple[Any, ...], raw_name: bytes, extra: bytes) -> ZipEntry:
    flags, method, crc, packed, size = values[5], values[6], values[9], values[10], values[11]
    size, packed, offset = _zip64(extra, [size, packed, values[18]])
    name = raw_name.decode("utf-8" if flags & _UTF8 else "cp437", "surrogateescape")
    kind = stat.S_IFMT(values[17] >> 16)
    return ZipEntry(name, bool(flags & _ENCRYPTED), method, crc, packed, size, offset, kind)


def _zip64(extra: bytes, values: list[int]) -> list[int]:
    """Return size, packed size and offset, those of 0xFFFFFFFF replaced by the wide ones of the extra field."""
    position = 0
    while position + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, position)
        if tag == 1:
            field = extra[position + 4 : position + 4 + length]
            wide = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
            try:
                return [next(wide) if value == _SATURATED else value for value in values]
            except (StopIteration, RuntimeError):
                raise DamagedArchive("the wide sizes of an entry are missing") from None
        position += 4 + length
    return values


def _inflated(unpack: Any, packed: bytes) -> Iterator[bytes]:
    """Yield what packed bytes unpack to, at most CHUNK at once."""
    while not unpack.eof:
        yield decompress(unpack, packed)
        packed = b""
        if unpack.needs_input:
            return
