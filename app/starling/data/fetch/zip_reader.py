"""Read a zip file that nobody vouches for: what its directory claims is checked before anything is unpacked."""

from __future__ import annotations

import errno
import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from starling.core.archives.bounded_zip import open_zip
from starling.core.archives.unpacked_stream import CHUNK, DamagedArchive
from starling.core.budget import BudgetExceeded

MAX_DIRECTORY_BYTES = 32 << 20
"""Room for 300,000 entries of usual names. zipfile makes half a gigabyte of the worst one of this size, in 10 s."""
_METHODS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "xz", 99: "AES"}
"""Names of those that other tools write, by PKWARE's number."""
_READ = frozenset((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
"""zipfile unpacks the others without a bound on what a chunk of them becomes."""
_ENCRYPTED = 1


class ZipReader:
    """The entries of a zip file; every method raises DamagedArchive for what is cut, damaged or a lie.

    BudgetExceeded for a directory of over MAX_DIRECTORY_BYTES.
    """

    def __init__(self, file: IO[bytes]) -> None:
        if not zipfile.is_zipfile(file):
            raise DamagedArchive("its end is missing, so it is cut")
        with _damage_told():
            self._archive = open_zip(file, MAX_DIRECTORY_BYTES)
        self.entries = self._archive.infolist()
        if sum(entry.compress_size for entry in self.entries) > file.seek(0, os.SEEK_END):
            raise DamagedArchive("its entries overlap or claim more bytes than it has")

    def chunks(self, entry: zipfile.ZipInfo) -> Iterator[bytes]:
        """Yield the content of an entry, checked against its size and checksum."""
        left = entry.file_size
        with _damage_told(), self._archive.open(entry) as content:
            while chunk := content.read(CHUNK):
                left -= len(chunk)
                yield chunk
        if left:
            raise DamagedArchive(f"{entry.filename!r} holds fewer bytes than it claims")


def is_zip(file: IO[bytes]) -> bool:
    """Return whether a file begins or ends as a zip file."""
    file.seek(0)
    return file.read(4) in (b"PK\3\4", b"PK\5\6") or zipfile.is_zipfile(file)


def kind_of(entry: zipfile.ZipInfo) -> int:
    """Return the type bits of an entry's mode, 0 where none are given."""
    return stat.S_IFMT(entry.external_attr >> 16)


def why_unread(entry: zipfile.ZipInfo) -> str | None:
    """Say why an entry that may be whole is not read, by its directory; None where it is."""
    if entry.flag_bits & _ENCRYPTED:
        return "is encrypted; unpack it yourself"
    if entry.compress_type not in _READ:
        method = _METHODS.get(entry.compress_type, f"method {entry.compress_type}")
        return f"is packed by {method}, which is not read; unpack the archive and pack it again with zip -r"
    return None


@contextmanager
def _damage_told() -> Iterator[None]:
    """Turn what zipfile raises on hostile bytes, which is nearly anything, into DamagedArchive."""
    try:
        yield
    except (DamagedArchive, BudgetExceeded, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # of the disk
        raise DamagedArchive(str(error) or type(error).__name__) from None
