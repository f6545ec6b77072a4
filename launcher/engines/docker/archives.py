"""Read files of containers from the archives that the engine makes, without access to its machine's disk."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Any

import docker.errors

from starling.core.archives.tar_reader import HEADER_BYTES, TarReader
from starling.core.archives.unpacked_stream import DamagedArchive
from starling.core.budget import Budget, BudgetExceeded


def read_archived_file(api: Any, container: str, path: str, most_bytes: int) -> bytes:
    """Return a plain file of at most `most_bytes`; empty for a link or anything else, or if the container is gone."""
    try:
        stream, about = api.get_archive(container, path)
    except docker.errors.NotFound:
        return b""
    # Go's file mode: the high bits give the type, and a plain file has none of them set.
    if about["mode"] >> 9 or about["size"] > most_bytes:
        stream.close()
        return b""
    try:
        return _first_file(b"".join(_at_most(stream, most_bytes + HEADER_BYTES)), most_bytes)
    except (BudgetExceeded, DamagedArchive):
        return b""
    finally:
        stream.close()


def _at_most(stream: Iterable[bytes], most_bytes: int) -> Iterator[bytes]:
    budget = Budget(bytes=most_bytes)
    for chunk in stream:
        budget.spend(bytes=len(chunk))
        yield chunk


def _first_file(archive: bytes, most_bytes: int) -> bytes:
    tar = TarReader(io.BytesIO(archive))
    member = next(tar.members(), None)
    if member is None or not member.isreg() or member.size > most_bytes:
        return b""
    return b"".join(tar.chunks(member))
