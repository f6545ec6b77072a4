"""Read a checkpoint of another YOLOv5 trainer, with or without anchors, without executing anything in it.

Such a file holds a pickle of whole module objects, which `inert_pickle` reads as data, and the numbers of each
storage, which `torch_file` finds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starling.config.shipped import find_config
from starling.config.yaml_reader import read_yaml
from starling.core.errors import CheckpointError
from starling.core.files.refusals import readable
from starling.core.words import shown
from starling.model.blocks import DEFAULT_ACTIVATION
from starling.model.detector import build_detector
from starling.model.families import family_of_tensors, foreign_kind
from starling.model.inert_pickle import Record, TensorRef
from starling.model.torch_file import StoredTensors, TorchFile, open_torch_file

MAX_DEPTH = 64
"""Maximum depth of nested modules."""
MAX_CLASSES = 100_000
ANCHOR_FREE = tuple(f"yolov5{size}{levels}u.yaml" for levels in ("", "6") for size in "nsmlx")
"""The layouts of the anchor-free detectors that are read."""


class _OtherLayout(CheckpointError):
    """The file holds an anchor-free detector that no shipped layout describes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignCheckpoint:
    """The contents of a foreign checkpoint that describe its detector."""

    state_dict: dict[str, Tensor]
    """Tensors by YOLOv5's names; floating-point tensors as float32."""
    names: tuple[str, ...]
    """Class names; empty if the file has none."""
    layout: dict[str, Any] | None
    """The layout's mapping, with `activation` and `csp_activation` as found in the modules."""
    anchors: Tensor | None
    """[levels, anchors, 2] in stride units."""
    strides: tuple[float, ...] | None
    epoch: int | None
    """Epoch of the checkpoint; -1 for a finished training."""

    @property
    def nc(self) -> int:
        """Number of classes: the number of names, else the layout's `nc`, else 0."""
        return len(self.names) or int((self.layout or {}).get("nc", 0))


@readable(CheckpointError)
def read_foreign_checkpoint(path: Path) -> ForeignCheckpoint:
    """Read a `.pt` of the popular YOLOv5 trainer, or a plain state dict; prefers the weights of the EMA.

    Raises CheckpointError for a file that is missing, damaged or too large, has a global outside the table, or holds no
    detector.
    """
    try:
        checkpoint = _read(path)
    except _OtherLayout:
        raise
    except CheckpointError as error:
        raise _named(path) or error from None
    family = family_of_tensors(checkpoint.state_dict) if checkpoint.layout is None else None
    if family is not None:
        raise _another(path, family)
    return checkpoint


def _read(path: Path) -> ForeignCheckpoint:
    try:
        with open_torch_file(path) as file:
            return _Reader(file).checkpoint()
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from None
    except PermissionError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror or shown(error)}; check the path"
        ) from None
    except Exception as error:
        raise CheckpointError(f"{path}: damaged, or not a checkpoint: {shown(error)}") from None


def _named(path: Path) -> CheckpointError | None:
    """Return the error for a file of another family, or for no checkpoint at all; None for an unknown kind."""
    kind = foreign_kind(path)
    return None if kind is None else _another(path, kind)


def _another(path: Path, kind: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {kind}; this program reads its own checkpoints and those of YOLOv5 detectors only: use the program that "
        "the file is for, or train from --weights yolov5s.pt"
    )


class _Reader:
    """One open checkpoint file."""

    def __init__(self, file: TorchFile) -> None:
        self._file = file
        self._tensors = StoredTensors(file)

    def checkpoint(self) -> ForeignCheckpoint:
        """Return the contents of the file; raises CheckpointError."""
        top = self._file.content if isinstance(self._file.content, dict) else {"model": self._file.content}
        model = _weights(top)
        state = model.state if isinstance(model, Record) else {}
        refs = dict(_tensors(model)) if isinstance(model, Record) else _plain_tensors(model)
        if not refs:
            raise CheckpointError("holds no detector: no tensors under `ema` or `model`")
        # Files of 2021 and before contain the anchors a second time, in pixels.
        tensors = {name: self._tensor(ref) for name, ref in refs.items() if not name.endswith("anchor_grid")}
        anchors = [tensor for name, tensor in tensors.items() if name.endswith(".anchors")]
        stride = state.get("stride")
        epoch = top.get("epoch")
        free = anchor_free_layout(tensors)
        if free is None and isinstance(model, Record) and _has_distances(tensors):
            raise _OtherLayout(
                f"an anchor-free detector of another layout than {ANCHOR_FREE[0]} to {ANCHOR_FREE[-1]}, which alone are "
                "read; use the program that the file is for"
            )
        return ForeignCheckpoint(
            state_dict=tensors,
            names=_names(state.get("names", top.get("names"))),
            layout=free or _layout(state.get("yaml"), model),
            anchors=anchors[-1] if anchors else None,
            strides=tuple(self._tensor(stride).tolist()) if isinstance(stride, TensorRef) else None,
            epoch=epoch if isinstance(epoch, int) else None,
        )

    def _tensor(self, ref: TensorRef) -> Tensor:
        """Return a copy of a tensor, as float32 if it is floating-point."""
        view = self._tensors.view(ref)
        return view.to(torch.float32 if view.is_floating_point() else view.dtype, copy=True).contiguous()


def _weights(top: dict[str, Any]) -> Any:
    """Return the module or state dict with the weights to use: the moving average if there is one."""
    average = top.get("ema")
    if isinstance(average, list | tuple) and average:
        average = average[0]  # for a time the average was stored with the number of its updates
    return average or top.get("model") or top.get("state_dict") or top


def _tensors(module: Record, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, TensorRef]]:
    """Yield (name, tensor) in the order of a state dict: parameters, buffers, then submodules."""
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
    """Return the tensors of a state dict saved without its module; an empty mapping if `mapping` is no state dict."""
    if not isinstance(mapping, dict):
        return {}
    return {
        name: ref for name, ref in mapping.items() if isinstance(name, str) and isinstance(ref, TensorRef)
    }


def anchor_free_layout(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Return the shipped anchor-free layout that has exactly tensors of these names and shapes; None for no such layout.

    The layout in a file of an anchor-free detector is not used: its keys are those of another program.
    """
    if not _has_distances(tensors):
        return None
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    nc = next((shape[0] for name, shape in shapes.items() if name.endswith(".cv3.0.2.bias") and shape), 0)
    for name in ANCHOR_FREE if nc else ():
        layout = read_yaml(find_config("layouts", name))
        with torch.device("meta"):
            own = build_detector(layout, nc=nc).state_dict()
        if {key: tensor.shape for key, tensor in own.items()} == shapes:
            return {**layout, "nc": nc}
    return None


def _has_distances(names: Iterable[str]) -> bool:
    return any(name.endswith(".dfl.conv.weight") for name in names)


def _names(value: Any) -> tuple[str, ...]:
    """Return class names from a list, or from a mapping of 0, 1, 2, ... to names."""
    if value is None:
        return ()
    ordered = [value.get(i) for i in range(len(value))] if isinstance(value, dict) else value
    if not isinstance(ordered, list | tuple) or not all(type(name) in (str, int) for name in ordered):
        raise CheckpointError("class names are neither a list of text nor one for each of 0, 1, 2, ...")
    if len(ordered) > MAX_CLASSES:
        raise CheckpointError(f"more than {MAX_CLASSES} classes")
    return tuple(map(str, ordered))  # a YAML reader turns names of digits into numbers


def _layout(value: Any, model: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        return None
    layout = {key: _plain(item) for key, item in value.items() if isinstance(key, str)}
    for key, block in (("activation", "Conv"), ("csp_activation", "BottleneckCSP")):
        shown = _activation(model, block)
        if shown not in (None, DEFAULT_ACTIVATION):
            layout[key] = shown
    return layout


def _activation(module: Record, block: str, depth: int = 0) -> str | None:
    """Return the activation of the first block of this kind that has one, in the notation of layouts."""
    children = {
        name: child
        for name, child in (module.state.get("_modules") or {}).items()
        if isinstance(child, Record)
    }
    act = children.get("act") if module.kind == block else None
    if act is not None and act.kind == "LeakyReLU":
        return f"nn.LeakyReLU({act.state.get('negative_slope')})"
    if act is not None and act.kind in ("SiLU", "Hardswish", "ReLU"):
        return f"nn.{act.kind}()"
    if depth < MAX_DEPTH:
        for child in children.values():
            found = _activation(child, block, depth + 1)
            if found:
                return found
    return None


def _plain(value: Any, depth: int = 0) -> Any:
    """Return a copy that consists of plain values only."""
    if depth > MAX_DEPTH:
        raise CheckpointError(f"a layout nested deeper than {MAX_DEPTH}")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    raise CheckpointError("a layout that holds objects")
