"""Read a checkpoint of another YOLOv5 trainer without running any of it.

Such a file is a zip with a pickle of whole module objects, which `inert_pickle` reads as data, and one entry of raw
numbers for each storage.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.errors import CheckpointError
from app.model.blocks import DEFAULT_ACTIVATION
from app.model.inert_pickle import Record, TensorRef, read_pickle

MAX_PICKLE_BYTES = 64 * 2**20
"""The largest official checkpoint's pickle is under 1 MiB."""
MAX_DEPTH = 64
"""Modules inside modules."""
MAX_CLASSES = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignCheckpoint:
    """What a foreign checkpoint says about its detector."""

    state_dict: dict[str, Tensor]
    """By YOLOv5's names; floating-point tensors as float32."""
    names: tuple[str, ...]
    """Class names; empty where the file has none."""
    layout: dict[str, Any] | None
    """The layout's mapping, with the `activation` that the modules show."""
    anchors: Tensor | None
    """[levels, anchors, 2] in stride units."""
    strides: tuple[float, ...] | None
    epoch: int | None
    """-1 in a finished one."""

    @property
    def nc(self) -> int:
        """Number of classes: of the names, else of the layout, else 0."""
        return len(self.names) or int((self.layout or {}).get("nc", 0))


def read_foreign_checkpoint(path: Path) -> ForeignCheckpoint:
    """Read a `.pt` as the popular YOLOv5 trainer writes it, or a plain state dict; prefers the EMA's weights.

    Raises CheckpointError for a file that is missing, damaged, too large, names a global outside the table, or holds no
    detector.
    """
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            return _Archive(archive, path, size).checkpoint()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}; check the path") from None
    except zipfile.BadZipFile:
        raise CheckpointError(
            f"{path}: not a checkpoint in zip form; files of torch before 1.6 must be saved again by a newer one"
        ) from None


class _Archive:
    """One open checkpoint file."""

    def __init__(self, archive: zipfile.ZipFile, path: Path, size: int) -> None:
        self._archive = archive
        self._path = path
        # Entries may overlap and tensors share a storage; neither may grow past the file.
        self._bytes_left = size
        self._elements_left = size
        self._storages: dict[str, Tensor] = {}
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"{path}: a zip without a pickle of torch; not a checkpoint")
        self._root = pickles[0].removesuffix("data.pkl")

    def checkpoint(self) -> ForeignCheckpoint:
        """Return what the file holds; raises CheckpointError naming the file."""
        try:
            content = self._read("data.pkl", MAX_PICKLE_BYTES)
            if (
                self._root + "byteorder" in self._archive.namelist()
                and self._read("byteorder", 16) != b"little"
            ):
                raise CheckpointError("written on a big-endian machine, which is not supported")
            return self._describe(read_pickle(content))
        except CheckpointError as error:
            raise CheckpointError(f"{self._path}: {error}") from None
        except Exception as error:
            raise CheckpointError(f"{self._path}: damaged, or not a checkpoint: {error}") from None

    def _describe(self, top: Any) -> ForeignCheckpoint:
        top = top if isinstance(top, dict) else {"model": top}
        model = top.get("ema") or top.get("model") or top.get("state_dict") or top
        state = model.state if isinstance(model, Record) else {}
        refs = dict(_tensors(model)) if isinstance(model, Record) else _plain_tensors(model)
        if not refs:
            raise CheckpointError("holds no detector: no tensors under `ema` or `model`")
        # Files of 2021 and before keep the anchors a second time, in pixels.
        tensors = {name: self._tensor(ref) for name, ref in refs.items() if not name.endswith("anchor_grid")}
        anchors = [tensor for name, tensor in tensors.items() if name.endswith(".anchors")]
        stride = state.get("stride")
        epoch = top.get("epoch")
        return ForeignCheckpoint(
            state_dict=tensors,
            names=_names(state.get("names", top.get("names"))),
            layout=_layout(state.get("yaml"), model),
            anchors=anchors[-1] if anchors else None,
            strides=tuple(self._tensor(stride).tolist()) if isinstance(stride, TensorRef) else None,
            epoch=epoch if isinstance(epoch, int) else None,
        )

    def _tensor(self, ref: TensorRef) -> Tensor:
        """Return a copy of a tensor, float32 where it is floating-point."""
        storage = self._storages.get(ref.storage.key)
        if storage is None:
            expected = ref.storage.numel * ref.storage.dtype.itemsize
            content = self._read(f"data/{ref.storage.key}", expected)
            if len(content) != expected:
                raise CheckpointError(f"storage {ref.storage.key} is cut short; copy the file again")
            storage = torch.empty(0, dtype=ref.storage.dtype)
            if content:  # frombuffer refuses an empty buffer
                storage = torch.frombuffer(bytearray(content), dtype=ref.storage.dtype)
            self._storages[ref.storage.key] = storage
        if storage.dtype != ref.storage.dtype or len(storage) != ref.storage.numel:
            raise CheckpointError(f"storage {ref.storage.key} is described in two ways")
        self._elements_left -= prod(ref.size)
        if self._elements_left < 0:
            raise CheckpointError("its tensors are together larger than the file")
        view = storage.as_strided(ref.size, ref.stride, ref.offset)
        return view.to(torch.float32 if view.is_floating_point() else view.dtype, copy=True).contiguous()

    def _read(self, name: str, limit: int) -> bytes:
        """Return an entry's bytes; refuses compressed ones, which torch never writes, and any above `limit`."""
        entry = self._archive.getinfo(self._root + name)
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > limit:
            raise CheckpointError(f"the entry {name} is compressed or too large")
        self._bytes_left -= entry.file_size
        if self._bytes_left < 0:
            raise CheckpointError("its entries are together larger than the file")
        return self._archive.read(entry)


def _tensors(module: Record, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, TensorRef]]:
    """Yield (name, tensor) in the order of a state dict: parameters, buffers, then modules inside."""
    if depth > MAX_DEPTH:
        raise CheckpointError(f"modules nested deeper than {MAX_DEPTH}")
    hidden = module.state.get("_non_persistent_buffers_set") or ()
    for group in ("_parameters", "_buffers"):
        for name, ref in (module.state.get(group) or {}).items():
            if isinstance(ref, TensorRef) and not (group == "_buffers" and name in hidden):
                yield f"{prefix}{name}", ref
    for name, child in (module.state.get("_modules") or {}).items():
        if isinstance(child, Record):
            yield from _tensors(child, f"{prefix}{name}.", depth + 1)


def _plain_tensors(mapping: Any) -> dict[str, TensorRef]:
    """Return the tensors of a state dict saved without its module; empty where it is none."""
    if not isinstance(mapping, dict):
        return {}
    return {
        name: ref for name, ref in mapping.items() if isinstance(name, str) and isinstance(ref, TensorRef)
    }


def _names(value: Any) -> tuple[str, ...]:
    """Return class names from a list, or from a mapping of 0, 1, 2, ... to names."""
    if value is None:
        return ()
    ordered = [value[i] for i in range(len(value))] if isinstance(value, dict) else value
    if not isinstance(ordered, list | tuple) or not all(isinstance(name, str) for name in ordered):
        raise CheckpointError("class names are not a list of text")
    if len(ordered) > MAX_CLASSES:
        raise CheckpointError(f"more than {MAX_CLASSES} classes")
    return tuple(ordered)


def _layout(value: Any, model: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        return None
    layout = {key: _plain(item) for key, item in value.items() if isinstance(key, str)}
    shown = _activation(model)
    if shown not in (None, DEFAULT_ACTIVATION):
        layout["activation"] = shown
    return layout


def _activation(module: Record, depth: int = 0) -> str | None:
    """Return the activation of the first convolution block, as a layout writes it."""
    for name, child in (module.state.get("_modules") or {}).items():
        if not isinstance(child, Record):
            continue
        if name == "act" and child.kind in ("SiLU", "Hardswish"):
            return f"nn.{child.kind}()"
        if name == "act" and child.kind == "LeakyReLU":
            return f"nn.LeakyReLU({child.state.get('negative_slope')})"
        found = _activation(child, depth + 1) if depth < MAX_DEPTH else None
        if found:
            return found
    return None


def _plain(value: Any, depth: int = 0) -> Any:
    """Return a copy made of plain values only."""
    if depth > MAX_DEPTH:
        raise CheckpointError(f"a layout nested deeper than {MAX_DEPTH}")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    raise CheckpointError("a layout that holds objects")
