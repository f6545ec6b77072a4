"""Read the two formats of `torch.save` as data: a zip, and before torch 1.6, a sequence of pickles.

Tensors are read from the file's storages, and are together never larger than the file.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from starling.core.archives.bounded_zip import open_zip
from starling.core.budget import BudgetExceeded
from starling.core.errors import CheckpointError
from starling.core.files.regular import open_regular
from starling.model.inert_pickle import GLOBALS, Pickled, Storage, Table, TensorRef, read_pickle

MAX_PICKLE_BYTES = 64 * 2**20
"""Maximum size of the pickle; that of the largest official checkpoint is under 1 MiB."""
MAX_DIRECTORY_BYTES = 4 * 2**20
"""Maximum size of a zip's directory: 50,000 storages fit; the largest official checkpoint has under 1,000."""
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of files of torch before 1.6: a pickle of the number 0x1950a86a20f9469cfc6c."""
LEGACY_PROTOCOL = 1001
_COUNT = 8
"""Size in bytes of the number of elements before each storage of the older format."""
_LOCAL_HEADER = struct.Struct("<26xHH")
"""The header before an entry's bytes, which ends with the lengths of the name and of the extra field that follow."""
_SPARSE_FROM = 64 * 2**20
_SPARSE_RATIO = 4


class TorchFile(Protocol):
    """A file written by `torch.save`."""

    size: int
    """Size of the file in bytes."""
    content: Any
    """The pickled object; see `inert_pickle`."""

    def read_storage(self, storage: Storage) -> Tensor:
        """Return the numbers of a storage, [numel] on the CPU; raises CheckpointError."""


@contextmanager
def open_torch_file(path: Path) -> Iterator[TorchFile]:
    """Open a file of either format.

    Raises CheckpointError, without the path, for another kind of file or an implausible one; OSError; and any exception
    of the standard library for damage.
    """
    with open_regular(path) as file:
        size = _true_size(file)
        if file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC:
            yield _LegacyFile(file, size)
            return
    with open_zip_form(path) as archive:
        archive.read_content(GLOBALS)
        yield archive


@contextmanager
def open_zip_form(path: Path) -> Iterator[ZipForm]:
    """Open a file of the present format without reading its pickle; raises the exceptions of `open_torch_file`."""
    with open_regular(path) as file:
        size = _true_size(file)
        try:
            archive = open_zip(file, MAX_DIRECTORY_BYTES)
        except BudgetExceeded as error:
            raise CheckpointError(f"not a checkpoint: {error}") from None
        except zipfile.BadZipFile:
            raise CheckpointError("damaged, or not a checkpoint: neither of torch's two forms") from None
        with archive:
            yield ZipForm(archive, file, size)


def _true_size(file: IO[bytes]) -> int:
    """Return the file's size; raises CheckpointError if most of the file is a hole, which takes no disk space."""
    state = os.fstat(file.fileno())
    on_disk = state.st_blocks * 512
    # Some network file systems report no blocks at all.
    if on_disk and state.st_size > max(_SPARSE_FROM, _SPARSE_RATIO * on_disk):
        raise CheckpointError("most of the file is a hole without bytes on the disk; copy the file again")
    return state.st_size


class ZipForm:
    """A zip with the entry `data.pkl` and one entry per storage, without compression."""

    def __init__(self, archive: zipfile.ZipFile, file: IO[bytes], size: int) -> None:
        self._archive, self._file, self.size = archive, file, size
        self.content: Any = None
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise CheckpointError("its entries are compressed, which torch never does")
        if sum(entry.file_size for entry in entries) > size:
            raise CheckpointError("its entries are together larger than the file")
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError("a zip without a pickle of torch; not a checkpoint")
        self._root = pickles[0].removesuffix("data.pkl")

    def read_pickle_bytes(self) -> bytes:
        """Return the bytes of the pickle."""
        return self._read("data.pkl", MAX_PICKLE_BYTES)

    def read_content(self, table: Table) -> None:
        """Read the pickle into `content`; `table` maps globals to their replacements."""
        content = self.read_pickle_bytes()
        if self._root + "byteorder" in self._archive.namelist() and self._read("byteorder", 16) != b"little":
            raise CheckpointError("written on a big-endian machine, which is not supported")
        self.content = read_pickle(content, table=table).value

    def read_storage(self, storage: Storage) -> Tensor:
        """Return the numbers of an entry."""
        entry = self._archive.getinfo(f"{self._root}data/{storage.key}")
        if entry.file_size != storage.numel * storage.dtype.itemsize:
            raise CheckpointError(
                f"storage {storage.key} is cut short or of another size; copy the file again"
            )
        return _fill(storage, lambda buffer: self._read_into(entry, buffer))

    def _read(self, name: str, limit: int) -> bytes:
        """Return the bytes of a small entry; refuse an entry above `limit`."""
        entry = self._archive.getinfo(self._root + name)
        if entry.file_size > limit:
            raise CheckpointError(f"the entry {name} is too large")
        content = bytearray(entry.file_size)
        self._read_into(entry, memoryview(content))
        return bytes(content)

    def _read_into(self, entry: zipfile.ZipInfo, buffer: memoryview) -> None:
        """Fill `buffer`, which is as long as the entry, without the copies that the archive's reader makes."""
        with self._archive.open(entry):  # checks the entry's local header
            pass
        self._file.seek(entry.header_offset)
        lengths = _LOCAL_HEADER.unpack(self._file.read(_LOCAL_HEADER.size))
        self._file.seek(sum(lengths), os.SEEK_CUR)
        _read_whole(self._file, buffer)
        if zlib.crc32(buffer) != entry.CRC:
            raise CheckpointError("damaged: an entry does not match its sum; copy the file again")


class _LegacyFile:
    """Five pickles: a magic number, a version, the machine, the object, the keys of the storages; then the storages."""

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
        """Return the offset of each storage's numbers."""
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
                break
        if position > self.size:
            raise CheckpointError("the file is cut short; copy it again")
        return offsets

    def read_storage(self, storage: Storage) -> Tensor:
        """Return the numbers of a storage, which follow the pickles."""
        self._file.seek(self._offsets[storage.key])
        return _fill(storage, lambda buffer: _read_whole(self._file, buffer))


def _fill(storage: Storage, read: Callable[[memoryview], None]) -> Tensor:
    """Return a new tensor [numel] whose bytes `read` writes."""
    tensor = torch.empty(storage.numel, dtype=storage.dtype)
    read(tensor.view(torch.uint8).numpy().data)
    return tensor


def _read_whole(file: IO[bytes], buffer: memoryview) -> None:
    if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
        raise CheckpointError("the file is cut short; copy it again")


class StoredTensors:
    """The tensors of one open file; tensors that share a storage in the file share it in memory."""

    def __init__(self, file: TorchFile) -> None:
        self._file = file
        # Tensors may share a storage, but together they must not be larger than the file.
        self._elements_left = file.size
        self._storages: dict[Storage, Tensor] = {}

    def view(self, ref: TensorRef) -> Tensor:
        """Return a tensor as described in the file; raises CheckpointError."""
        if ref.storage not in self._storages:
            self._storages[ref.storage] = self._file.read_storage(ref.storage)
        self._elements_left -= prod(ref.size)
        if self._elements_left < 0:
            raise CheckpointError("its tensors are together larger than the file")
        return self._storages[ref.storage].as_strided(ref.size, ref.stride, ref.offset)

    def filled(self, value: Any) -> Any:
        """Return a copy of nested plain values with a tensor in place of each TensorRef."""
        if isinstance(value, TensorRef):
            return self.view(value)
        if isinstance(value, Mapping):
            return {key: self.filled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.filled(item) for item in value]
        if isinstance(value, tuple):
            return tuple([self.filled(item) for item in value])
        return value
