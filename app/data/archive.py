"""Unpack a zip or tar file that nobody vouches for: inside the folder only, plain files only, within limits."""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from app.errors import DataError, DiskFull

MAX_ENTRIES = 4_000_000
MAX_UNPACKED_BYTES = 200 << 30
"""The largest archive of the shipped descriptions unpacks to 20 GB."""
MAX_RATIO = 100
"""Bytes unpacked for each byte packed: text reaches about 20, bombs 1000."""
_ALWAYS_ALLOWED = 64 << 20
"""Bytes that the ratio does not count against: small archives of label files pack well."""
_CHUNK = 1 << 20
_NOISE = ("__MACOSX", ".DS_Store")
"""What one operating system adds to every archive."""


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    open: Callable[[], IO[bytes]]


def unpack(
    archive: Path, folder: Path, *, strip: str = "", show: Callable[[int], None] = lambda n: None
) -> int:
    """Unpack all plain files of `archive` below `folder`, and return how many.

    `strip` is a leading folder that is left off where an entry has it. `show` gets the number of files so far.
    Raises DataError for an absolute path, `..`, a link, a device, an encrypted entry, a file that would replace
    another, a bomb, or anything that is no archive; what was unpacked before it is left to the caller to remove.
    """
    allowed = min(MAX_UNPACKED_BYTES, max(archive.stat().st_size * MAX_RATIO, _ALWAYS_ALLOWED))
    unpacked = count = 0
    try:
        for count, entry in enumerate(_entries(archive), start=1):
            if count > MAX_ENTRIES:
                raise DataError(f"{archive}: over {MAX_ENTRIES} files; refused")
            target = folder.joinpath(*_safe_parts(archive, entry.name, strip))
            target.parent.mkdir(parents=True, exist_ok=True)
            # "x": nothing is ever replaced, neither by a name that stands twice nor by a second archive.
            with entry.open() as source, open(target, "xb") as file:
                while chunk := source.read(_CHUNK):
                    unpacked += len(chunk)
                    if unpacked > allowed:
                        raise DataError(f"{archive}: unpacks to over {allowed >> 20} MiB; refused as a bomb")
                    file.write(chunk)
            show(count)
    except FileExistsError as error:
        raise DataError(f"{archive}: {error.filename} would be written twice; refused") from None
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        EOFError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise DataError(f"{archive}: cannot be unpacked: {error}; delete it and fetch it again") from None
    return count


def _entries(archive: Path) -> Iterator[_Entry]:
    """Yield the plain files of a zip or tar file, whatever it is called. Raises DataError for any other kind."""
    if zipfile.is_zipfile(archive):
        yield from _zip_entries(archive)
    elif tarfile.is_tarfile(archive):
        yield from _tar_entries(archive)
    else:
        raise DataError(f"{archive}: neither a zip nor a tar file; delete it and fetch it again")


def _zip_entries(archive: Path) -> Iterator[_Entry]:
    with zipfile.ZipFile(archive) as file:
        needed, free = sum(item.file_size for item in file.infolist()), shutil.disk_usage(archive.parent).free
        if needed > free:
            raise DiskFull(f"{archive}: {needed / 1e6:.0f} MB to unpack, {free / 1e6:.0f} MB free; make room")
        for item in file.infolist():
            kind = stat.S_IFMT(item.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise DataError(f"{archive}: {item.filename} is a link or a device; refused")
            if item.flag_bits & 1:
                raise DataError(f"{archive}: {item.filename} is encrypted; unpack it yourself")
            if not item.is_dir() and not _is_noise(item.filename):
                yield _Entry(item.filename, lambda item=item: file.open(item))  # type: ignore[misc]


def _tar_entries(archive: Path) -> Iterator[_Entry]:
    with tarfile.open(archive) as file:
        for item in file:
            if not (item.isreg() or item.isdir()):
                raise DataError(f"{archive}: {item.name} is a link or a device; refused")
            source = file.extractfile(item) if item.isreg() and not _is_noise(item.name) else None
            if source is not None:
                yield _Entry(item.name, lambda source=source: source)  # type: ignore[misc]


def _is_noise(name: str) -> bool:
    return any(part in _NOISE for part in PurePosixPath(name).parts)


def _safe_parts(archive: Path, name: str, strip: str) -> tuple[str, ...]:
    """Return the path of an entry as components below the folder; raises DataError for one that leads elsewhere."""
    path = PurePosixPath(name)
    parts = tuple(part for part in path.parts if part != ".")
    odd = "\\" in name or "\0" in name or os.path.isabs(name) or (parts and parts[0][1:2] == ":")
    if odd or not parts or ".." in parts:
        raise DataError(f"{archive}: {name!r} leads out of the folder; refused")
    lead = PurePosixPath(strip).parts
    return parts[len(lead) :] if lead and parts[: len(lead)] == lead and len(parts) > len(lead) else parts
