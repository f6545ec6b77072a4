"""A zip file that nobody vouches for, opened by the standard library in bounded memory."""

from __future__ import annotations

import zipfile
from typing import IO

from starling.core.budget import BudgetExceeded


def open_zip(file: IO[bytes], most_bytes: int) -> zipfile.ZipFile:
    """Open a zip file whose directory, its list of entries, has at most `most_bytes`.

    Raises BudgetExceeded for a larger one, and for a damaged one nearly anything: BadZipFile, struct.error, OSError,
    UnicodeDecodeError, NotImplementedError. Closing the result leaves `file` open.
    """
    directory = _ShortReads(file, most_bytes)
    archive = zipfile.ZipFile(directory)  # type: ignore[call-overload]  # it needs read, seek and tell
    directory.limit = None
    assert isinstance(archive, zipfile.ZipFile)
    return archive


class _ShortReads:
    """The file that a zip's directory is read from: zipfile reads the directory at once, however long it says it is."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file = file
        self.limit: int | None = limit
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if self.limit is not None and size > self.limit:
            raise BudgetExceeded(f"its list of entries is more than {self.limit >> 20} MiB")
        return self._file.read(size)
