"""Build a detector from a layout, by a table of blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app.config.shipped import find_config
from app.errors import ConfigError
from app.model.blocks import ACTIVATIONS, C3, DEFAULT_ACTIVATION, SPPF, Bottleneck, Concat, Conv
from app.model.head import Detect
from app.model.layout import Layout, Row, check_anchors, parse_layout, read_layout

Anchors = Sequence[Sequence[Any]] | int | float
"""Pixels, one row a level; or a number of anchors a level."""


@dataclass(frozen=True, slots=True)
class Port:
    """What flows between two layers: a map of `channels`, one cell every `stride` pixels."""

    channels: int
    stride: float


@dataclass(frozen=True, slots=True)
class Built:
    """A layer and what it gives."""

    module: nn.Module
    port: Port


Builder = Callable[[Row, Layout, Sequence[Port]], Built]


class Detector(nn.Module):
    """A detector: layers in the order of their layout, a `Detect` head at the end."""

    def __init__(
        self, layers: Sequence[nn.Module], sources: Sequence[Sequence[int]], layout: dict[str, Any]
    ) -> None:
        """Join built `layers`; `sources[i]` are the rows that layer i reads, -1 the image."""
        super().__init__()
        self.model = nn.ModuleList(layers)
        self.sources = tuple(tuple(s) for s in sources)
        self.layout = layout
        """The layout's mapping with `nc` and `anchors` as built: enough to build this detector again."""
        self.names: tuple[str, ...] = tuple(f"class{i}" for i in range(self.head.nc))
        # A map is kept only where a later row than the next one reads it.
        self._kept = frozenset(s for i, row in enumerate(self.sources) for s in row if s != i - 1)

    @property
    def head(self) -> Detect:
        """The last layer."""
        head = self.model[-1]
        assert isinstance(head, Detect)
        return head

    @property
    def nc(self) -> int:
        """Number of classes."""
        return self.head.nc

    @property
    def stride(self) -> Tensor:
        """[levels] pixels between two cells of each level."""
        return self.head.stride

    def forward(self, images: Tensor) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return raw predictions a level; in eval mode (decoded, raw). See `Detect`.

        `images` is [B,3,H,W] in 0..1, H and W multiples of the largest stride.
        """
        x: Any = images
        kept: dict[int, Tensor] = {}
        for index, (layer, sources) in enumerate(zip(self.model, self.sources, strict=True)):
            inputs = [x if source == index - 1 else kept[source] for source in sources]
            x = layer(inputs if isinstance(layer, Concat | Detect) else inputs[0])
            if index in self._kept:
                kept[index] = x
        return x

    def count_parameters(self) -> int:
        """Return the number of trainable numbers, frozen ones included."""
        return sum(p.numel() for p in self.parameters())

    def fused(self) -> Detector:
        """Return a copy for inference, in eval mode, with every normalisation folded into its convolution."""
        copy = deepcopy(self).eval().requires_grad_(False)
        for module in copy.modules():
            if isinstance(module, Conv):
                module.fuse()
        return copy


def build_detector(
    layout: Path | str | Mapping[str, Any],
    nc: int,
    anchors: Anchors | None = None,
    channels: int = 3,
    names: Sequence[str] | None = None,
) -> Detector:
    """Build a detector with fresh weights, drawn from torch's global generator.

    `layout` is a YAML path, the name of a shipped layout, or its mapping. `anchors` replaces the layout's own: pixels
    (one row a level), or a number a level that starts square and waits for AutoAnchor.

    Raises ConfigError for a layout that cannot work, UsageError for a file that cannot be read.
    """
    if isinstance(nc, bool) or not isinstance(nc, int) or nc < 1:
        raise ConfigError("nc", nc, "must be at least 1 class")
    mapping = dict(layout) if isinstance(layout, Mapping) else _read(layout)
    plan = parse_layout(mapping, tuple(BLOCKS))
    levels = len(plan.rows[-1].sources)
    chosen = plan.anchors if anchors is None else check_anchors(anchors, levels)

    ports: list[Port] = []
    layers: list[nn.Module] = []
    for row in plan.rows[:-1]:
        inputs = [ports[s] if s >= 0 else Port(channels, 1.0) for s in row.sources]
        built = BLOCKS[row.module](row, plan, inputs)
        layers.append(built.module)
        ports.append(built.port)
    _set_activation(layers, plan.activation)
    maps = [ports[s] for s in plan.rows[-1].sources]
    anchors_px = _anchors_px(chosen, [port.stride for port in maps])
    layers.append(Detect(nc, anchors_px, [port.stride for port in maps], [port.channels for port in maps]))

    record = {**mapping, "nc": nc, "anchors": anchors_px.flatten(1).tolist()}
    detector = Detector(layers, [row.sources for row in plan.rows], record)
    if names is not None:
        if len(names) != nc:
            raise ConfigError("names", tuple(names), f"{len(names)} names for {nc} classes")
        detector.names = tuple(names)
    return detector


def _set_activation(layers: Sequence[nn.Module], activation: str) -> None:
    """Give every activated convolution the layout's activation, here and in no other detector."""
    if activation == DEFAULT_ACTIVATION:
        return
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, Conv) and not isinstance(module.act, nn.Identity):
                module.act = ACTIVATIONS[activation]()


def _read(layout: Path | str) -> dict[str, Any]:
    return read_layout(layout if isinstance(layout, Path) else find_config("layouts", layout))


def _anchors_px(anchors: tuple[tuple[float, ...], ...] | int, strides: Sequence[float]) -> Tensor:
    """Return [levels, anchors, 2] pixels; a bare number gives squares from 2 to 8 strides."""
    if isinstance(anchors, int):
        ratio = torch.linspace(1, 3, anchors, device="cpu").exp2()
        sides = torch.tensor(strides, device="cpu").view(-1, 1) * ratio
        return torch.stack((sides, sides), dim=-1)
    return torch.tensor(anchors, device="cpu").view(len(anchors), -1, 2)


def _integers(row: Row, at_least: int, at_most: int) -> list[int]:
    """Return the row's args as integers (True is 1); raises ConfigError where their number or kind is wrong."""
    if not at_least <= len(row.args) <= at_most:
        raise ConfigError(f"row {row.index}", row.args, f"{row.module} takes {at_least} to {at_most} args")
    for arg in row.args:
        if not isinstance(arg, int) or not 0 <= arg <= 65536:
            raise ConfigError(f"row {row.index}", arg, f"{row.module} takes whole numbers, 0 or above")
    return [int(arg) for arg in row.args]


def _at(args: Sequence[int], position: int, default: int) -> int:
    return args[position] if len(args) > position else default


def _single(row: Row, inputs: Sequence[Port]) -> Port:
    if len(inputs) != 1:
        raise ConfigError(f"row {row.index}", row.sources, f"{row.module} reads exactly one row")
    return inputs[0]


def _channels_out(row: Row, layout: Layout, count: int) -> int:
    if count < 1:
        raise ConfigError(f"row {row.index}", count, "channels must be at least 1")
    return layout.channels(count)


def _repeat(row: Row, layout: Layout, first: nn.Module, again: Callable[[], nn.Module]) -> nn.Module:
    number = layout.repeats(row.number)
    return first if number == 1 else nn.Sequential(first, *(again() for _ in range(number - 1)))


def _build_conv(row: Row, layout: Layout, inputs: Sequence[Port]) -> Built:
    """Args: channels, kernel [1], stride [1], padding [kernel // 2], groups [1]."""
    port = _single(row, inputs)
    args = _integers(row, 1, 5)
    c_out = _channels_out(row, layout, args[0])
    kernel, stride, groups = _at(args, 1, 1), _at(args, 2, 1), _at(args, 4, 1)
    padding = args[3] if len(args) > 3 else None
    if not kernel or not stride or not groups or c_out % groups or port.channels % groups:
        raise ConfigError(f"row {row.index}", row.args, "kernel, stride and groups do not fit")

    def conv(c_in: int) -> nn.Module:
        return Conv(c_in, c_out, kernel, stride, padding, groups)

    module = _repeat(row, layout, conv(port.channels), lambda: conv(c_out))
    return Built(module, Port(c_out, port.stride * stride ** layout.repeats(row.number)))


def _build_bottleneck(row: Row, layout: Layout, inputs: Sequence[Port]) -> Built:
    """Args: channels, shortcut [true]."""
    port = _single(row, inputs)
    args = _integers(row, 1, 2)
    c_out = _channels_out(row, layout, args[0])
    shortcut = bool(_at(args, 1, True))
    first = Bottleneck(port.channels, c_out, shortcut)
    return Built(
        _repeat(row, layout, first, lambda: Bottleneck(c_out, c_out, shortcut)), Port(c_out, port.stride)
    )


def _build_c3(row: Row, layout: Layout, inputs: Sequence[Port]) -> Built:
    """Args: channels, shortcut [true]; `number` is the bottlenecks inside."""
    port = _single(row, inputs)
    args = _integers(row, 1, 2)
    c_out = _channels_out(row, layout, args[0])
    shortcut = bool(_at(args, 1, True))
    return Built(C3(port.channels, c_out, layout.repeats(row.number), shortcut), Port(c_out, port.stride))


def _build_sppf(row: Row, layout: Layout, inputs: Sequence[Port]) -> Built:
    """Args: channels, kernel [5]."""
    port = _single(row, inputs)
    args = _integers(row, 1, 2)
    c_out = _channels_out(row, layout, args[0])
    kernel = _at(args, 1, 5)
    if kernel % 2 == 0:
        raise ConfigError(f"row {row.index}", kernel, "the pool of SPPF needs an odd kernel")
    return Built(SPPF(port.channels, c_out, kernel), Port(c_out, port.stride))


def _build_upsample(row: Row, layout: Layout, inputs: Sequence[Port]) -> Built:
    """Args: size [None], scale, mode; only a whole scale and `nearest`."""
    port = _single(row, inputs)
    size, scale, mode = row.args if len(row.args) == 3 else ("?", None, None)
    if size not in (None, "None") or not isinstance(scale, int) or scale < 1 or mode != "nearest":
        raise ConfigError(f"row {row.index}", row.args, "Upsample takes [None, whole scale, nearest]")
    return Built(
        nn.Upsample(scale_factor=float(scale), mode="nearest"), Port(port.channels, port.stride / scale)
    )


def _build_concat(row: Row, layout: Layout, inputs: Sequence[Port]) -> Built:
    """Args: dimension, always 1."""
    if row.args not in ((), (1,)):
        raise ConfigError(f"row {row.index}", row.args, "Concat joins channels: [1]")
    strides = {port.stride for port in inputs}
    if len(strides) > 1:
        raise ConfigError(f"row {row.index}", row.sources, f"Concat reads maps of strides {sorted(strides)}")
    return Built(Concat(), Port(sum(port.channels for port in inputs), inputs[0].stride))


def _build_detect(row: Row, layout: Layout, inputs: Sequence[Port]) -> Built:
    raise ConfigError(f"row {row.index}", row.module, "Detect is built last")


BLOCKS: dict[str, Builder] = {
    "Conv": _build_conv,
    "Bottleneck": _build_bottleneck,
    "C3": _build_c3,
    "SPPF": _build_sppf,
    "nn.Upsample": _build_upsample,
    "Upsample": _build_upsample,
    "Concat": _build_concat,
    "Detect": _build_detect,
}
"""Every module that a layout may name."""
