"""Unpack a zip or tar file of unknown origin: only inside the folder, only plain files, within limits.

The claims in the directory of a zip file are checked before anything is unpacked.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from starling.core.archives.bounded_zip import open_zip
from starling.core.archives.tar_reader import TarReader, is_tar
from starling.core.archives.unpacked_stream import CHUNK, DamagedArchive
from starling.core.budget import BudgetExceeded
from starling.core.errors import DataError, DiskFull
from starling.core.files.regular import open_regular
from starling.core.words import printable, shown

MAX_ENTRIES = 4_000_000
MAX_LEVELS = 100
"""Maximum depth of a path; creating and removing deeper folders would exhaust Python's stack."""
MAX_UNPACKED_BYTES = 200 << 30
"""Maximum bytes of the unpacked files; the largest archive of the shipped descriptions unpacks to 20 GB."""
MAX_RATIO = 100
"""Maximum unpacked bytes per packed byte: text reaches about 20, archive bombs 1000."""
_ALWAYS_ALLOWED = 64 << 20
"""Unpacked bytes that are allowed at any ratio: small archives of label files pack well."""
_ENTRY_BYTES = 4 << 10
"""Bytes that each file counts in addition to its content: even an empty file takes time, and a block on most disks."""
_CHUNK = 1 << 20
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
_NOISE = ("__MACOSX", ".DS_Store")
"""Entries that one operating system adds to every archive."""


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    size: int
    chunks: Callable[[], Iterator[bytes]]


def unpack(
    archive: Path, folder: Path, *, strip: str = "", show: Callable[[int], None] = lambda n: None
) -> int:
    """Unpack all plain files of `archive` below `folder`, and return their number.

    `strip` is a leading folder that is removed from entries that have it. `show` gets the number of files so far.
    Raises DataError for an absolute path, `..`, a link, a device, an encrypted entry, a file that would replace
    another, a bomb, a truncated or damaged archive, and any other file; OSError for a full disk. After an error
    a folder that this call created is removed; the content of an older folder is left to the caller.
    """
    made = not os.path.lexists(folder)
    try:
        return _unpack(archive, folder, strip, show)
    except BaseException:
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _unpack(archive: Path, folder: Path, strip: str, show: Callable[[int], None]) -> int:
    count = 0
    try:
        with open_regular(archive) as file:
            allowance = _Allowance(os.fstat(file.fileno()).st_size)
            for count, entry in enumerate(_entries(file, archive), start=1):
                if count > MAX_ENTRIES:
                    raise DataError(f"{archive}: over {MAX_ENTRIES} files; refused")
                target = folder.joinpath(*_safe_parts(archive, entry.name, strip))
                _write(entry, target, allowance)
                show(count)
    except FileExistsError as error:
        raise DataError(f"{archive}: {printable(error.filename)} would be written twice; refused") from None
    except (DamagedArchive, BudgetExceeded) as error:
        raise DataError(
            f"{archive}: cannot be unpacked: {printable(str(error))}; delete it and fetch it again"
        ) from None
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise
        raise DataError(
            f"{archive}: cannot be unpacked: {printable(error.filename or folder)}: {error.strerror or error}; "
            "check the archive and the folder"
        ) from None
    return count


def _write(entry: _Entry, target: Path, allowance: _Allowance) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free if entry.size > _CHUNK else _CHUNK
    if entry.size > free:
        raise DamagedArchive(f"{entry.name!r} claims {entry.size / 1e6:.0f} MB, {free / 1e6:.0f} MB are free")
    allowance.take(_ENTRY_BYTES)
    # "x": no file is ever replaced, neither by a repeated name nor by a second archive.
    with open(target, "xb") as file:
        for chunk in entry.chunks():
            allowance.take(len(chunk))
            file.write(chunk)


class _Allowance:
    """The number of bytes that an archive may still unpack to, depending on its size."""

    def __init__(self, packed: int) -> None:
        self._most = min(MAX_UNPACKED_BYTES, max(packed * MAX_RATIO, _ALWAYS_ALLOWED))
        self._taken = 0

    def take(self, count: int) -> None:
        """Count bytes. Raises BudgetExceeded if the allowance is used up."""
        self._taken += count
        if self._taken > self._most:
            raise BudgetExceeded(f"it unpacks to over {self._most >> 20} MiB, so it is taken for a bomb")


def _entries(file: IO[bytes], archive: Path) -> Iterator[_Entry]:
    """Yield the plain files of a zip or tar file, whatever its name. Raises DataError for any other kind of file."""
    head = file.read(512)
    if not is_tar(head) and is_zip(file):
        return _zip_entries(ZipReader(file), archive)
    if not is_tar(head) and not _is_old_tar(head):
        raise DataError(f"{archive}: neither a zip nor a tar file; delete it and fetch it again")
    file.seek(0)
    # The whole tar stream has an allowance too, because headers and skipped members are never written.
    stream = _Allowance(os.fstat(file.fileno()).st_size)
    return _tar_entries(TarReader(file, stream.take), archive)


def _zip_entries(file: ZipReader, archive: Path) -> Iterator[_Entry]:
    needed, free = sum(entry.file_size for entry in file.entries), shutil.disk_usage(archive.parent).free
    if needed > free:
        raise DiskFull(f"{archive}: {needed / 1e6:.0f} MB to unpack, {free / 1e6:.0f} MB free; make room")
    for entry in file.entries:
        # zipfile cuts a name off at a NUL; the check needs the whole name, to refuse it.
        name = entry.orig_filename if "\0" in entry.orig_filename else entry.filename
        if kind_of(entry) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DataError(f"{archive}: {printable(name)} is a link or a device; refused")
        if problem := why_unread(entry):
            raise DataError(f"{archive}: {printable(name)} {problem}")
        if not name.endswith("/") and not _is_noise(name):
            yield _Entry(name, entry.file_size, partial(file.chunks, entry))


def _tar_entries(file: TarReader, archive: Path) -> Iterator[_Entry]:
    for member in file.members():
        if not (member.isreg() or member.isdir()):
            raise DataError(f"{archive}: {printable(member.name)} is a link or a device; refused")
        if member.isreg() and not _is_noise(member.name):
            yield _Entry(member.name, member.size, partial(file.chunks, member))


def _is_old_tar(head: bytes) -> bool:
    """Return whether the first block is a tar header without a magic number, as before 1988, with a valid checksum."""
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _is_noise(name: str) -> bool:
    return any(part in _NOISE for part in PurePosixPath(name).parts)


def _safe_parts(archive: Path, name: str, strip: str) -> tuple[str, ...]:
    """Return the components of an entry's path below the folder; raises DataError for a path that leads out of it."""
    path = PurePosixPath(name)
    parts = tuple(part for part in path.parts if part != ".")
    odd = "\\" in name or os.path.isabs(name) or (parts and parts[0][1:2] == ":")
    if len(parts) > MAX_LEVELS:
        raise DataError(f"{archive}: {shown(name, 40)!r} lies over {MAX_LEVELS} folders deep; refused")
    if odd or not parts or ".." in parts:
        raise DataError(f"{archive}: {name!r} leads out of the folder; refused")
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        raise DataError(f"{archive}: {name!r} has a control character in its name; refused")
    lead = PurePosixPath(strip).parts
    return parts[len(lead) :] if lead and parts[: len(lead)] == lead and len(parts) > len(lead) else parts


MAX_DIRECTORY_BYTES = 32 << 20
"""Maximum directory size: enough for 300,000 entries with usual names. Reading the worst one takes 10 s and 0.5 GB."""
_METHODS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "xz", 99: "AES"}
"""Names of the compression methods of other tools, by PKWARE's number."""
_READ = frozenset((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
"""Methods that are read; zipfile unpacks other methods without a bound on the size of a chunk."""
_ENCRYPTED = 1


class ZipReader:
    """The entries of a zip file; every method raises DamagedArchive for a truncated, damaged or lying file.

    Raises BudgetExceeded for a directory of over MAX_DIRECTORY_BYTES.
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
        """Yield the content of an entry, and check its size and checksum."""
        left = entry.file_size
        with _damage_told(), self._archive.open(entry) as content:
            while chunk := content.read(CHUNK):
                left -= len(chunk)
                yield chunk
        if left:
            raise DamagedArchive(f"{entry.filename!r} holds fewer bytes than it claims")


def is_zip(file: IO[bytes]) -> bool:
    """Return whether a file begins or ends like a zip file."""
    file.seek(0)
    return file.read(4) in (b"PK\3\4", b"PK\5\6") or zipfile.is_zipfile(file)


def kind_of(entry: zipfile.ZipInfo) -> int:
    """Return the type bits of an entry's mode; 0 if the entry has no mode."""
    return stat.S_IFMT(entry.external_attr >> 16)


def why_unread(entry: zipfile.ZipInfo) -> str | None:
    """Return why a valid entry is not read, judged by its directory record; None if the entry is read."""
    if entry.flag_bits & _ENCRYPTED:
        return "is encrypted; unpack it yourself"
    if entry.compress_type not in _READ:
        method = _METHODS.get(entry.compress_type, f"method {entry.compress_type}")
        return f"is packed by {method}, which is not read; unpack the archive and pack it again with zip -r"
    return None


@contextmanager
def _damage_told() -> Iterator[None]:
    """Turn the many exceptions that zipfile raises on hostile bytes into DamagedArchive."""
    try:
        yield
    except (DamagedArchive, BudgetExceeded, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # an error of the disk
        raise DamagedArchive(str(error) or type(error).__name__) from None
