"""Tensors out of the storages of a file that `torch.save` wrote, never more of them than the file holds."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor

from starling.core.errors import CheckpointError
from starling.model.inert_pickle import Storage, TensorRef
from starling.model.torch_file import TorchFile


class StoredTensors:
    """The tensors of one open file; those that share a storage there share it here."""

    def __init__(self, file: TorchFile) -> None:
        self._file = file
        # Tensors share a storage; together they may not grow past the file.
        self._elements_left = file.size
        self._storages: dict[Storage, Tensor] = {}

    def view(self, ref: TensorRef) -> Tensor:
        """Return a tensor as the file describes it; raises CheckpointError."""
        if ref.storage not in self._storages:
            self._storages[ref.storage] = self._file.read_storage(ref.storage)
        self._elements_left -= prod(ref.size)
        if self._elements_left < 0:
            raise CheckpointError("its tensors are together larger than the file")
        return self._storages[ref.storage].as_strided(ref.size, ref.stride, ref.offset)

    def filled(self, value: Any) -> Any:
        """Return a copy of plain nested values with a tensor at each reference to one."""
        if isinstance(value, TensorRef):
            return self.view(value)
        if isinstance(value, Mapping):
            return {key: self.filled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.filled(item) for item in value]
        if isinstance(value, tuple):
            return tuple([self.filled(item) for item in value])
        return value
