"""Write checkpoints in the form of the classic trainer: pickled module objects, whose classes this project does not have.

A pickle names a class by its module and its name alone. The classes are empty, and the modules that hold them are
registered only while the file is written; the tensors are those of a detector of this project.
"""

from __future__ import annotations

import contextlib
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from starling.model.detector import Detector, build_detector

MODULES = ("models", "models.yolo", "models.common")
KINDS = {
    "C3Transformer": ("models.common", "C3TR"),
    "Detect": ("models.yolo", "Detect"),
    **{
        name: ("models.common", name)
        for name in (
            *("Conv", "Bottleneck", "BottleneckCSP", "C3", "C3Ghost", "Focus", "SPP", "SPPF", "Concat"),
            *("GhostConv", "GhostBottleneck", "TransformerBlock", "TransformerLayer"),
        )
    },
}
"""Our block -> its classic module and class."""
OLD_LINE: dict[str, Any] = {
    "nc": 3,
    "depth_multiple": 0.33,
    "width_multiple": 0.25,
    "anchors": [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119]],
    "backbone": [
        [-1, 1, "Focus", [32, 3]],
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 3, "BottleneckCSP", [64]],
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 1, "SPP", [64, [5, 9, 13]]],
        [-1, 3, "BottleneckCSP", [64, False]],
    ],
    "head": [
        [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
        [[-1, 2], 1, "Concat", [1]],
        [-1, 3, "BottleneckCSP", [64, False]],
        [[8, 5], 1, "Detect", ["nc", "anchors"]],
    ],
}
"""The blocks of 2020, small: Focus first, BottleneckCSP throughout."""
OLD_ACTIVATIONS = {"activation": "nn.Hardswish()", "csp_activation": "nn.LeakyReLU(0.1)"}
"""Those of autumn 2020. No layout of the time says so: only the modules do."""


@contextlib.contextmanager
def stub_modules(*names: str) -> Iterator[None]:
    """Register empty modules of these names, and of their parents' names, for as long as the block lasts."""
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                module = ".".join(parts[:end])
                if module not in sys.modules:
                    patch.setitem(sys.modules, module, types.ModuleType(module))
        yield


def stub_class(module: str, name: str, *, plain: bool = False) -> type[nn.Module]:
    """Return the empty class of that name in a module of `stub_modules`: the same each time, as pickling asks for."""
    if not hasattr(sys.modules[module], name):
        bases = () if plain else (nn.Module,)
        setattr(sys.modules[module], name, type(name, bases, {"__module__": module}))
    return getattr(sys.modules[module], name)  # type: ignore[no-any-return]


def trained(
    layout: dict[str, Any] | Path | str, nc: int = 3, names: tuple[str, ...] | None = None
) -> Detector:
    """Return a detector with weights and statistics unlike fresh ones, each of them exact in half precision."""
    torch.manual_seed(0)
    detector = build_detector(layout, nc=nc, names=names)
    for key, value in detector.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif key.endswith(("running_mean", "bias", "bn.weight")):
            value.add_(0.1 * torch.rand_like(value))
        if value.is_floating_point():
            value.copy_(value.half().float())
    return detector.eval()


class ClassicFiles:
    """Writes checkpoints while the classic modules can be imported, as when such a file was made."""

    modules: ClassVar[tuple[str, ...]] = MODULES
    kinds: ClassVar[dict[str, tuple[str, str]]] = KINDS
    top = "models.yolo"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(
        self,
        detector: Detector,
        *,
        top: str = "DetectionModel",
        names: Any = None,
        half: bool = True,
        average: str = "none",
        stripped: bool = True,
        legacy: bool = False,
        beside: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    ) -> Path:
        """Write one file; `average` is none, module or pair (with its updates), `beside` is added to the model."""
        path = self._folder / "classic.pt"
        with stub_modules(*self.modules), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the older form misses the source of our empty classes
            model = self._model(detector, top, names, half)
            other = self._model(detector, top, names, half)
            if average != "none":  # then the model itself is not the one to take
                for parameter in model.parameters():
                    parameter.data.zero_()
            content = {
                "epoch": -1 if stripped else 12,
                "best_fitness": 0.5,
                "training_results": None,
                "model": model,
                "ema": {"none": None, "module": other, "pair": (other, 40)}[average],
                "updates": None if stripped else 40,
                "optimizer": None if stripped else _momenta(model),
                "wandb_id": None,
                "date": "2020-10-29T12:00:00",
                **((beside() if callable(beside) else beside) or {}),
            }
            torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        return path

    def _model(self, detector: Detector, top: str, names: Any, half: bool) -> nn.Module:
        model = stub_class(self.top, top)()
        model.model = nn.Sequential(*(_imitation(layer, self.kinds) for layer in detector.model))
        model.names = list(detector.names) if names is None else names
        model.yaml = {key: value for key, value in detector.layout.items() if "activation" not in key}
        model.stride, model.nc, model.save = detector.stride.clone(), detector.nc, [2, 5, 8]
        model.hyp = {"lr0": 0.01, "momentum": 0.937}
        model.class_weights = torch.ones(detector.nc, dtype=torch.float64)
        return model.half() if half else model


class SuccessorFiles(ClassicFiles):
    """Writes checkpoints of the classic trainer's successor: the same networks with an anchor-free head."""

    modules = (*(f"ultralytics.nn.modules.{name}" for name in ("block", "conv", "head")), "ultralytics.nn.tasks",
               "ultralytics.utils")  # fmt: skip
    kinds: ClassVar[dict[str, tuple[str, str]]] = {
        **{name: ("ultralytics.nn.modules.block", name) for name in ("Bottleneck", "C3", "SPPF")},
        **{name: ("ultralytics.nn.modules.conv", name) for name in ("Conv", "Concat")},
        "_Expectation": ("ultralytics.nn.modules.block", "DFL"),
        "AnchorFreeDetect": ("ultralytics.nn.modules.head", "Detect"),
    }
    top = "ultralytics.nn.tasks"

    def settings(self, **values: Any) -> Any:
        """Return settings as an object of the successor's own class. To be called by `beside` while it is written."""
        kind = stub_class("ultralytics.utils", "IterableSimpleNamespace", plain=True)
        namespace = kind.__new__(kind)
        namespace.__dict__.update(values)
        return namespace


def _imitation(module: nn.Module, kinds: Mapping[str, tuple[str, str]]) -> nn.Module:
    """Return a classic module with copies of the parameters and buffers that stand in our one's state dict."""
    place = kinds.get(type(module).__name__)
    if place is None and not list(module.children()):
        return deepcopy(module)
    twin = nn.Module.__new__(type(module) if place is None else stub_class(*place))
    nn.Module.__init__(twin)
    for name, parameter in module.named_parameters(recurse=False):
        twin.register_parameter(name, nn.Parameter(parameter.detach().clone()))
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            twin.register_buffer(name, buffer.clone())
    for name, child in module.named_children():
        twin.add_module(name, _imitation(child, kinds))
    if place == ("models.yolo", "Detect"):
        pixels = (module.anchors * module.stride.view(-1, 1, 1)).view(len(module.stride), 1, -1, 1, 1, 2)
        twin.register_buffer("anchor_grid", pixels)
        twin.stride = module.stride.clone()
    twin.i, twin.f, twin.type = 0, -1, f"{type(twin).__module__}.{type(twin).__name__}"
    return twin


def _momenta(model: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer.state_dict()
