"""The two forms of a file that `torch.save` writes, read as data: a zip, and, before torch 1.6, pickles in a row."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from app.errors import CheckpointError
from app.model.inert_pickle import Pickled, Storage, read_pickle

MAX_PICKLE_BYTES = 64 * 2**20
"""The largest official checkpoint's pickle is under 1 MiB."""
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How torch before 1.6 begins: a pickle of the number 0x1950a86a20f9469cfc6c."""
LEGACY_PROTOCOL = 1001
_COUNT = 8
"""Bytes of the number of elements before each storage of the older form."""


class TorchFile(Protocol):
    """What `torch.save` wrote."""

    size: int
    """Bytes on disk."""
    content: Any
    """The pickled object; see `inert_pickle`."""

    def read_storage(self, storage: Storage) -> bytes:
        """Return a storage's raw little-endian numbers, as many as it says; raises CheckpointError."""


@contextmanager
def open_torch_file(path: Path) -> Iterator[TorchFile]:
    """Open a file of either form.

    Raises CheckpointError, without the path, for what is neither or cannot be trusted; OSError; and whatever damage
    makes the standard library raise.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC:
            yield _LegacyFile(file, size)
            return
        try:
            archive = zipfile.ZipFile(file)
        except zipfile.BadZipFile:
            raise CheckpointError("damaged, or not a checkpoint: neither of torch's two forms") from None
        with archive:
            yield _ZipFile(archive, size)


class _ZipFile:
    """A zip with the entry `data.pkl` and one for each storage, none of them compressed."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive, self.size = archive, size
        self._bytes_left = size
        """Entries may overlap; together they may not grow past the file."""
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError("a zip without a pickle of torch; not a checkpoint")
        self._root = pickles[0].removesuffix("data.pkl")
        content = self._read("data.pkl", MAX_PICKLE_BYTES)
        if self._root + "byteorder" in archive.namelist() and self._read("byteorder", 16) != b"little":
            raise CheckpointError("written on a big-endian machine, which is not supported")
        self.content = read_pickle(content).value

    def read_storage(self, storage: Storage) -> bytes:
        """Return an entry's numbers."""
        expected = storage.numel * storage.dtype.itemsize
        content = self._read(f"data/{storage.key}", expected)
        if len(content) != expected:
            raise CheckpointError(f"storage {storage.key} is cut short; copy the file again")
        return content

    def _read(self, name: str, limit: int) -> bytes:
        """Return an entry's bytes; refuses compressed ones, which torch never writes, and any above `limit`."""
        entry = self._archive.getinfo(self._root + name)
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > limit:
            raise CheckpointError(f"the entry {name} is compressed or too large")
        self._bytes_left -= entry.file_size
        if self._bytes_left < 0:
            raise CheckpointError("its entries are together larger than the file")
        return self._archive.read(entry)


class _LegacyFile:
    """Five pickles: a magic number, a version, the machine, the object, the storages' keys. Then each storage."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self.size = file, size
        file.seek(0)
        head = file.read(MAX_PICKLE_BYTES)
        version = read_pickle(head, len(LEGACY_MAGIC))
        machine = read_pickle(head, version.end)
        if version.value != LEGACY_PROTOCOL or machine.value.get("little_endian") is not True:
            raise CheckpointError("an unknown version of the older form, or of a big-endian machine")
        pickled = read_pickle(head, machine.end)
        self.content = pickled.value
        self._offsets = self._find_storages(pickled, read_pickle(head, pickled.end))

    def _find_storages(self, pickled: Pickled, keys: Pickled) -> dict[str, int]:
        """Return where each storage's numbers begin."""
        offsets = {}
        position = keys.end
        for key in keys.value:
            storage = pickled.storages[key]
            self._file.seek(position)
            if int.from_bytes(self._file.read(_COUNT), "little") != storage.numel:
                raise CheckpointError(f"storage {key} is cut short or of another size; copy the file again")
            offsets[key] = position + _COUNT
            position = offsets[key] + storage.numel * storage.dtype.itemsize
        if position > self.size:
            raise CheckpointError("the file is cut short; copy it again")
        return offsets

    def read_storage(self, storage: Storage) -> bytes:
        """Return the numbers that follow the pickles."""
        self._file.seek(self._offsets[storage.key])
        return self._file.read(storage.numel * storage.dtype.itemsize)
