"""Read a pickle of module objects as data: no global in it is imported, called or built.

Two passes. The first (`pickle_check`) walks the opcodes: it refuses opcodes that no checkpoint needs, globals outside
one table, and contents that would take too much memory or time. The second builds inert records in place of objects.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from starling.model.pickle_check import PickleWalk, refused_global

Table = Mapping[tuple[str, str], Any]
"""A global that a pickle may name -> its replacement."""


@dataclass(frozen=True, slots=True)
class Pickled:
    """The result of reading one pickle."""

    value: Any
    """Plain values, with `Record`s for objects and `TensorRef`s for tensors."""
    storages: dict[str, Storage]
    """All storages that the pickle names, by key."""
    end: int
    """Position of the next byte behind the pickle."""


def read_pickle(content: bytes, start: int = 0, table: Table | None = None) -> Pickled:
    """Read the pickle that begins at byte `start`; `table` maps globals to replacements, by default GLOBALS.

    Raises CheckpointError for an opcode, a global or a size that a YOLOv5 checkpoint does not need; exceptions of the
    standard unpickler for a damaged pickle pass through.
    """
    table = GLOBALS if table is None else table
    end = _check_opcodes(content, start, table)
    reader = _Reader(io.BytesIO(content[start:end]), table)
    return Pickled(reader.load(), reader.storages, end)


class Record:
    """Replaces an object of a foreign class: keeps the class's name, and the state as data."""

    __slots__ = ("state",)
    kind = ""

    def __new__(cls, *args: object) -> Record:
        record = super().__new__(cls)
        record.state = {}
        return record

    def __init__(self, *args: object) -> None:
        """Accept and drop the arguments for the constructor."""

    state: dict[str, Any]

    def __setstate__(self, state: object) -> None:
        self.state = state if isinstance(state, dict) else {}


class _Mapping(dict[Any, Any]):
    """Replaces an OrderedDict; drops the attributes that a state dict carries in addition to its items."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Drop `state`."""


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Storage:
    dtype: torch.dtype
    key: str
    numel: int


_MOST_DIMENSIONS = 16
"""Maximum number of dimensions of a tensor; convolutions have four."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """The place of a tensor in the file; the tensor is read on request."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check that every element lies inside the storage, and that no element occurs twice."""
        numbers = (self.offset, *self.size[:_MOST_DIMENSIONS], *self.stride[:_MOST_DIMENSIONS])
        possible = all(type(n) is int and 0 <= n < 2**63 for n in numbers)
        if not possible or len(self.size) > _MOST_DIMENSIONS or len(self.size) != len(self.stride):
            raise ValueError("a tensor with impossible sizes")
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        if prod(self.size) and (last >= self.storage.numel or prod(self.size) > self.storage.numel):
            raise ValueError("a tensor larger than its storage")


class _Function:
    """Replaces a function: an object that the file cannot change."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any) -> Any:
        """Return the place of a tensor, or the data of a parameter."""
        if self._name == "_rebuild_parameter":
            return args[0]
        storage, offset, size, stride = args[:4]
        if not isinstance(storage, Storage):
            raise ValueError("a tensor without a storage")
        return TensorRef(storage, offset, tuple(size), tuple(stride))

    def __setstate__(self, state: object) -> None:
        raise ValueError("a function has no state")


def _record(kind: str) -> type[Record]:
    return type(kind, (Record,), {"__slots__": (), "kind": kind})


_MODULES = {
    "models.common": "Bottleneck C3 Concat Conv SPPF Focus SPP BottleneckCSP DWConv GhostConv GhostBottleneck C3Ghost "
    "C3TR TransformerBlock TransformerLayer",
    "models.yolo": "Detect DetectionModel Model",
    "ultralytics.nn.modules.block": "Bottleneck C3 DFL SPPF",
    "ultralytics.nn.modules.conv": "Concat Conv",
    "ultralytics.nn.modules.head": "Detect",
    "ultralytics.nn.tasks": "DetectionModel",
    "torch.nn.modules.activation": "SiLU LeakyReLU Hardswish ReLU MultiheadAttention",
    "torch.nn.modules.batchnorm": "BatchNorm2d",
    "torch.nn.modules.container": "ModuleList Sequential",
    "torch.nn.modules.conv": "Conv2d",
    "torch.nn.modules.linear": "Identity Linear NonDynamicallyQuantizableLinear _LinearWithBias",
    "torch.nn.modules.padding": "ZeroPad2d",
    "torch.nn.modules.pooling": "MaxPool2d",
    "torch.nn.modules.upsampling": "Upsample",
}
_IGNORED = {
    "pathlib": "PosixPath WindowsPath",
    "pathlib._local": "PosixPath WindowsPath",
    "numpy": "ndarray dtype",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "_codecs": "encode",
    "ultralytics.utils": "IterableSimpleNamespace",
}
"""Classes in settings and scores beside the model; their records are never read."""

PLAIN_GLOBALS: Table = {
    ("collections", "OrderedDict"): _Mapping,
    ("torch", "BFloat16Storage"): _StorageType(torch.bfloat16),
    ("torch", "BoolStorage"): _StorageType(torch.bool),
    ("torch", "ByteStorage"): _StorageType(torch.uint8),
    ("torch", "CharStorage"): _StorageType(torch.int8),
    ("torch", "DoubleStorage"): _StorageType(torch.float64),
    ("torch", "FloatStorage"): _StorageType(torch.float32),
    ("torch", "HalfStorage"): _StorageType(torch.float16),
    ("torch", "IntStorage"): _StorageType(torch.int32),
    ("torch", "LongStorage"): _StorageType(torch.int64),
    ("torch", "ShortStorage"): _StorageType(torch.int16),
    ("torch._utils", "_rebuild_parameter"): _Function("_rebuild_parameter"),
    ("torch._utils", "_rebuild_tensor_v2"): _Function("_rebuild_tensor_v2"),
}
"""All globals in a checkpoint of this trainer, which holds tensors and plain values."""

GLOBALS: Table = {
    **{
        (module, name): _record(name)
        for table in (_MODULES, _IGNORED)
        for module, names in table.items()
        for name in names.split()
    },
    ("__builtin__", "set"): set,
    ("builtins", "set"): set,
    **PLAIN_GLOBALS,
}
"""All globals that a foreign checkpoint may name, and their replacements."""


class _Reader(pickle.Unpickler):
    """Builds records only; all globals and storages go through the two methods below."""

    def __init__(self, file: io.BytesIO, table: Table) -> None:
        super().__init__(file)
        self._table = table
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement of a global."""
        try:
            return self._table[module, name]
        except KeyError:
            raise refused_global(module, name) from None

    def persistent_load(self, pid: Any) -> Storage | type[Record]:
        """Return the storage of a persistent id, or the class (torch before 1.6 adds the class's source)."""
        if pid[0] == "module" and isinstance(pid[1], type) and issubclass(pid[1], Record):
            return pid[1]
        kind, storage_type, key, _, numel, *view = pid
        if (
            kind != "storage"
            or not isinstance(storage_type, _StorageType)
            or not re.fullmatch(r"[0-9]{1,18}", key)
        ):
            raise ValueError("an unknown kind of persistent id")
        if view not in ([], [None]):
            raise ValueError("a storage that is a part of another")
        if type(numel) is not int or numel < 0:
            raise ValueError("a storage of impossible size")
        storage = Storage(storage_type.dtype, key, numel)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"storage {key} is described in two ways")
        return storage


def _check_opcodes(content: bytes, start: int, known: Collection[tuple[str, str]] = GLOBALS) -> int:
    """Refuse a pickle by its opcodes alone, before anything is built; return the position behind the pickle."""
    return PickleWalk(content, start, known).end()
