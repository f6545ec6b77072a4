"""The file of `launcher track backup`: a tar of database dumps and artifacts, closed by a manifest of digests.

The manifest is the last member, so a file that was cut short has none. Passwords are in no part of it: the servers
keep the ones they have.
"""

from __future__ import annotations

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
from typing import IO, Any, cast

from app.core.plain_json import parse_json
from launcher.errors import DataError

FORMAT = 1
MANIFEST = "manifest.json"
DATABASES = {"mlflow": "mlflow", "starling": "starling"}
"""Each database and the role that owns it: MLflow's with its users, and the studies of searches."""

ARTIFACTS = "artifacts/"
_MOST_MANIFEST = 512 * 1024**2
_CHUNK = 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What a verified backup holds."""

    created: str
    has_artifacts: bool
    files: int


class Digested(io.RawIOBase):
    """A reader that digests what passes."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self.sha256 = hashlib.sha256()

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Read and digest."""
        data = self._source.read(size)
        self.sha256.update(data)
        return data


class ArchiveWriter:
    """Add members to a new tar, the manifest last."""

    def __init__(self, archive: tarfile.TarFile, about: Mapping[str, Any]) -> None:
        self._tar = archive
        self._about = about
        self._digests: dict[str, str] = {}

    def add(self, name: str, size: int, source: IO[bytes], mtime: float = 0) -> None:
        """Add a file of `size` bytes read from `source`."""
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
    """Hold a backup open, and give a path to this very file: its own may lead to another one by the next look.

    Raises DataError for what is no file, or cannot be read.
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
    """Read the whole file and return what it holds; raises DataError for one that is not whole or not ours.

    `at` is where to read it, where `path` is but its name for messages.
    """
    digests: dict[str, str] = {}
    manifest: dict[str, Any] | None = None
    with opened(path, at) as archive:
        for member, file in members(path, archive):
            if manifest is not None:
                raise DataError(f"{path}: goes on after its manifest; it is not a backup of these servers")
            if member.name == MANIFEST:
                manifest = _read_manifest(path, member, file)
                continue
            digests[member.name] = _digest(file)
    if manifest is None:
        raise DataError(f"{path}: has no manifest: it was cut short, or is no backup of these servers")
    if manifest.get("format") != FORMAT:
        raise DataError(f"{path}: has format {manifest.get('format')}; this launcher reads {FORMAT}")
    if (
        manifest.get("sha256") != digests
        or not {database_member(name) for name in DATABASES} <= digests.keys()
    ):
        raise DataError(
            f"{path}: is damaged: its contents are not what its manifest says; take another backup"
        )
    return Contents(
        created=str(manifest.get("created", "")),
        has_artifacts=bool(manifest.get("has_artifacts")),
        files=len(digests),
    )


@contextmanager
def opened(path: Path, at: Path | None = None) -> Iterator[tarfile.TarFile]:
    """Open a backup; raises DataError for what is no tar, or breaks off."""
    try:
        with tarfile.open(at or path, mode="r:") as archive:
            yield archive
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (tarfile.TarError, EOFError):
        raise DataError(f"{path}: is no whole tar file: it was cut short, or is no backup") from None


def members(path: Path, archive: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """Yield each member and its contents; raises DataError for one that no backup has."""
    seen = set()
    for member in archive:
        parts = PurePosixPath(member.name).parts
        known = member.name == MANIFEST or parts[0] in ("databases", ARTIFACTS.rstrip("/"))
        file = archive.extractfile(member) if member.isreg() else None
        if file is None or not known or ".." in parts or member.name in seen:
            raise DataError(f"{path}: holds {member.name!r}, which no backup has; nothing was changed")
        seen.add(member.name)
        yield member, file


def _read_manifest(path: Path, member: tarfile.TarInfo, file: IO[bytes]) -> dict[str, Any]:
    try:
        value = parse_json(file.read()) if member.size <= _MOST_MANIFEST else None
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
