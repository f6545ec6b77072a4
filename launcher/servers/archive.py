"""The file of `launcher track backup`: a tar of database dumps and artifacts, with a manifest of digests at its end.

The manifest is the last member, so a truncated file has none. The file holds no passwords: a restore keeps the
servers' passwords.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import stat
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar, cast

from starling.core.archives.tar_reader import TarReader, as_file
from starling.core.archives.unpacked_stream import DamagedArchive, is_packed
from starling.core.budget import BudgetExceeded
from starling.core.errors import DataError
from starling.core.files.regular import open_regular
from starling.core.plain_json import parse_json
from starling.core.words import shown

FORMAT = 1
MANIFEST = "manifest.json"
DATABASES = {"mlflow": "mlflow", "starling": "starling"}
"""Each database and its owner's role: MLflow's database, with its users, and the database of studies."""

ARTIFACTS = "artifacts/"
STAGED, REPLACED = ".restored", ".replaced"
"""Folders of a restore beside the artifacts: the new artifacts before the swap, and the old ones after it."""
MOST_FILES = 2_000_000
"""The most files in one backup: their names and digests take some 600 MB of memory when writing and when reading."""
_T = TypeVar("_T")
_MOST_MANIFEST = 512 * 1024**2
_CHUNK = 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """The contents of a verified backup."""

    created: str
    has_artifacts: bool
    files: int


class Digested(io.RawIOBase):
    """A reader that computes the digest of the data read through it."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self.sha256 = hashlib.sha256()

    def readable(self) -> bool:
        """Return True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Read `size` bytes, and add them to the digest."""
        data = self._source.read(size)
        self.sha256.update(data)
        return data


class ArchiveWriter:
    """Adds members to a new tar, the manifest last."""

    def __init__(self, archive: tarfile.TarFile, about: Mapping[str, Any]) -> None:
        self._tar = archive
        self._about = about
        self._digests: dict[str, str] = {}

    def add(self, name: str, size: int, source: IO[bytes], mtime: float = 0) -> None:
        """Add a file of `size` bytes read from `source`. Raises DataError for more than MOST_FILES."""
        if len(self._digests) >= MOST_FILES:
            raise DataError(
                f"more than {MOST_FILES:,} files, which no backup holds; copy the artifacts' volume itself, "
                "or delete old runs"
            )
        member = tarfile.TarInfo(name)
        member.size, member.mtime, member.mode = size, int(mtime), 0o600
        reader = Digested(source)
        self._tar.addfile(member, cast(IO[bytes], reader))
        self._digests[name] = reader.sha256.hexdigest()

    def seal(self) -> int:
        """Write the manifest and return the number of files."""
        payload = json.dumps({"format": FORMAT, **self._about, "sha256": self._digests}).encode()
        member = tarfile.TarInfo(MANIFEST)
        member.size, member.mode = len(payload), 0o600
        self._tar.addfile(member, io.BytesIO(payload))
        return len(self._digests)


def database_member(database: str) -> str:
    """Return the name of a database's dump in the archive."""
    return f"databases/{database}.dump"


@contextmanager
def held(path: Path) -> Iterator[Path]:
    """Keep a backup open, and yield a path to the open file: the file at `path` may be replaced meanwhile.

    Raises DataError if `path` is not a regular file or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DataError(f"{path}: is not a file; give the file that `launcher track backup` wrote")
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def verify(path: Path, at: Path | None = None) -> Contents:
    """Read the whole file and return its contents; raises DataError if it is incomplete or not a backup of ours.

    `at` is the path to read; `path` then is only the name in messages.
    """
    digests: dict[str, str] = {}
    manifest: dict[str, Any] | None = None
    with members(path, at) as found:
        for member in found:
            if manifest is not None:
                raise DataError(f"{path}: continues after its manifest; it is not a backup of these servers")
            if member.name == MANIFEST:
                manifest = _read_manifest(path, member)
                continue
            digests[member.name] = _digest(member.content)
    if manifest is None:
        raise DataError(f"{path}: has no manifest: it was cut short, or is no backup of these servers")
    if manifest.get("format") != FORMAT:
        raise DataError(f"{path}: has format {shown(manifest.get('format'))}; this launcher reads {FORMAT}")
    if (
        manifest.get("sha256") != digests
        or not {database_member(name) for name in DATABASES} <= digests.keys()
    ):
        raise DataError(
            f"{path}: is damaged: its contents are not what its manifest says; take another backup"
        )
    return Contents(
        created=shown(manifest.get("created", "")),
        has_artifacts=bool(manifest.get("has_artifacts")),
        files=len(digests),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One file of a backup; read `content` before requesting the next member."""

    name: str
    size: int
    mtime: float
    content: IO[bytes]


@contextmanager
def members(path: Path, at: Path | None = None) -> Iterator[Iterator[Member]]:
    """Open a backup and yield an iterator over its members.

    Iterating and reading raise DataError if the file is no tar, is truncated, or holds a member that no backup has.
    """
    with contextlib.closing(_open(path, at)) as file:
        yield _known_members(path, TarReader(file))


def _open(path: Path, at: Path | None) -> IO[bytes]:
    try:
        file = open_regular(at or path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if is_packed(file.read(6)):
        file.close()
        raise DataError(f"{path}: is packed, and no backup is; unpack it first")
    file.seek(0)
    return file


def _translated(path: Path, items: Iterator[_T]) -> Iterator[_T]:
    """Yield the items; an error in reading them becomes DataError, an error of the consumer passes unchanged."""
    try:
        yield from items
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except BudgetExceeded as error:
        raise DataError(f"{path}: is no backup: {error}") from None
    except DamagedArchive as error:
        raise DataError(
            f"{path}: is no whole tar file: it was cut short, or is no backup ({shown(error)})"
        ) from None


def is_left_over(name: str) -> bool:
    """Return whether an artifact, given its path in the folder of artifacts, is a leftover of a killed restore."""
    return PurePosixPath(name).parts[:1] in ((STAGED,), (REPLACED,))


def _known_members(path: Path, archive: TarReader) -> Iterator[Member]:
    seen: set[str] = set()
    for member in _translated(path, archive.members()):
        parts = PurePosixPath(member.name).parts
        below = len(parts) > 1 and parts[0] in ("databases", ARTIFACTS.rstrip("/"))
        plain = member.isreg() and member.name == "/".join(parts) and ".." not in parts
        if not (plain and (below or member.name == MANIFEST)) or member.name in seen:
            raise DataError(f"{path}: holds {shown(member.name)}, which no backup has; nothing was changed")
        seen.add(member.name)
        if len(seen) > MOST_FILES + 1:
            raise DataError(f"{path}: holds more than {MOST_FILES:,} files, which no backup has")
        content = as_file(_translated(path, archive.chunks(member)))
        yield Member(name=member.name, size=member.size, mtime=member.mtime, content=content)


def _read_manifest(path: Path, member: Member) -> dict[str, Any]:
    try:
        value = parse_json(member.content.read()) if member.size <= _MOST_MANIFEST else None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise DataError(f"{path}: its manifest cannot be read; take another backup")
    return value


def _digest(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
