"""Open an untrusted zip file with the standard library in bounded memory."""

from __future__ import annotations

import zipfile
from typing import IO

from starling.core.budget import BudgetExceeded


def open_zip(file: IO[bytes], most_bytes: int) -> zipfile.ZipFile:
    """Open a zip file whose directory, its list of entries, has at most `most_bytes`.

    Raises BudgetExceeded for a larger directory. A damaged file may raise BadZipFile, struct.error, OSError,
    UnicodeDecodeError or NotImplementedError. Closing the result leaves `file` open.
    """
    directory = _ShortReads(file, most_bytes)
    archive = zipfile.ZipFile(directory)  # type: ignore[call-overload]  # zipfile needs read, seek and tell only
    directory.limit = None
    assert isinstance(archive, zipfile.ZipFile)
    return archive


class _ShortReads:
    """A file with a limit on one read: zipfile reads the directory in one call, of the length that the file claims."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file = file
        self.limit: int | None = limit
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if self.limit is not None and size > self.limit:
            raise BudgetExceeded(f"its list of entries is more than {self.limit >> 20} MiB")
        return self._file.read(size)
