"""Files of containers, by the archives that an engine makes of them: no access to its machine's disk is needed."""

from __future__ import annotations

import io
import tarfile
from typing import Any

import docker.errors


def read_archived_file(api: Any, container: str, path: str, most_bytes: int) -> bytes:
    """Return a plain file of at most `most_bytes`; empty for anything else, also a link, and for a vanished container."""
    try:
        stream, about = api.get_archive(container, path)
    except docker.errors.NotFound:
        return b""
    # Go's file mode: a plain file has none of the type's bits, which are the high ones.
    if about["mode"] >> 9 or about["size"] > most_bytes:
        stream.close()
        return b""
    archive = b"".join(stream)
    try:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            member = tar.next()
            file = tar.extractfile(member) if member is not None and member.isreg() else None
            return b"" if file is None else file.read(most_bytes)
    except tarfile.TarError:
        return b""
