"""Read an untrusted tar file from front to back: headers within a budget, plain members only."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import IO, Any

from starling.core.archives.unpacked_stream import CHUNK, DamagedArchive, is_packed, unpacked
from starling.core.budget import Budget

HEADER_BYTES = 1 << 20
"""The limit for the headers of one member, long names and PAX records included; real headers have a few KiB."""
_MOST_GLOBALS = 1000
"""The most global PAX records, which tarfile copies to each member; real archives have one."""
_BLOCK = 512
_LONG_NUMBER = re.compile(rb"\d{21}")
"""tarfile's search for PAX records takes time quadratic in the length of a run of digits."""


class TarReader:
    """The members, in order, of a tar file, which may be packed by gzip, bzip2 or xz.

    Reading raises DamagedArchive if the file is truncated or damaged, and BudgetExceeded if a header is too large or
    takes too long. `count` is called with the number of bytes unpacked from a packed file, and may raise.
    """

    def __init__(self, file: IO[bytes], count: Callable[[int], None] = lambda n: None) -> None:
        self._stream = _Forward(unpacked(file, count))

    def members(self) -> Iterator[tarfile.TarInfo]:
        """Yield the header of each member; read a member's content with `chunks` before requesting the next member."""
        tar: tarfile.TarFile | None = None
        while True:
            self._stream.budget = Budget(header_bytes=HEADER_BYTES)
            try:
                tar = tar or tarfile.TarFile(fileobj=self._stream, mode="r")  # type: ignore[arg-type]
                member = tar.next()
            except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
                raise DamagedArchive(str(error) or "it ends too early") from None
            except RecursionError:
                raise DamagedArchive("its headers are nested too deep") from None
            if member is None:
                break
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all members: gigabytes for millions
            self._check(tar, member)
            yield member
        if not self._stream.at_end_mark():
            raise DamagedArchive("it ends without the mark of a tar file's end, so it is cut or damaged")

    def chunks(self, member: tarfile.TarInfo) -> Iterator[bytes]:
        """Yield the content of a regular member."""
        self._stream.seek(member.offset_data)
        left = member.size
        while left:
            chunk = self._stream.data(min(left, CHUNK))
            if not chunk:
                raise DamagedArchive(f"{member.name!r} ends too early")
            left -= len(chunk)
            yield chunk

    @staticmethod
    def _check(tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        if len(tar.pax_headers) > _MOST_GLOBALS or sum(map(len, tar.pax_headers.values())) > HEADER_BYTES:
            raise DamagedArchive("it has too many global headers")
        if member.size < 0:
            raise DamagedArchive(f"{member.name!r} has a negative size")
        if member.issparse():
            raise DamagedArchive(f"{member.name!r} is a sparse file, which no dataset needs")


def as_file(chunks: Iterator[bytes]) -> IO[bytes]:
    """Return chunks of bytes as one file, for libraries that read files."""
    return io.BufferedReader(_Chunks(chunks), CHUNK)


def is_tar(head: bytes) -> bool:
    """Return whether a file that begins with `head` (512 bytes) is packed, or has the mark of a tar file."""
    return is_packed(head) or head[257:262] == b"ustar"


class _Chunks(io.RawIOBase):
    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        part = self._rest[: len(buffer)]
        buffer[: len(part)] = part
        self._rest = self._rest[len(part) :]
        return len(part)


class _Forward:
    """The file object for tarfile, which reads headers only: reads have a budget, and seeks only go forward."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._position, self._last = file, 0, b""
        self.budget = Budget(header_bytes=HEADER_BYTES)

    def read(self, size: int) -> bytes:
        self.budget.spend(header_bytes=size)
        self._last = self.data(size)
        if size > _BLOCK and _LONG_NUMBER.search(self._last):
            raise DamagedArchive("a header holds a number of over 20 digits")
        return self._last

    def data(self, size: int) -> bytes:
        content = self._file.read(size)
        self._position += len(content)
        return content

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        if position < self._position:
            raise DamagedArchive("its headers lead backwards")
        if position > self._position and self._file.seekable():
            self._position = self._file.seek(position)
        while self._position < position:
            if not self.data(min(position - self._position, CHUNK)):
                raise DamagedArchive("it ends too early")

    def at_end_mark(self) -> bool:
        """Return whether the last block read consists of zeros."""
        return self._last == bytes(_BLOCK)
