"""Build a detector from a layout, with a table of blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from starling.config.shipped import find_config
from starling.core.errors import ConfigError
from starling.model.anchor_free.head import AnchorFreeDetect
from starling.model.blocks import ACTIVATIONS, DEFAULT_ACTIVATION, BottleneckCSP, Concat, Conv
from starling.model.head import Detect, Head
from starling.model.layout import Layout, Row, check_anchors, parse_layout, read_layout
from starling.model.rows import BLOCKS, Port

Anchors = Sequence[Sequence[Any]] | int | float
"""Anchors in pixels, one row per level; or the number of anchors per level."""

MAX_PARAMETERS = 250_000_000
"""Maximum number of parameters, 1 GB of float32; the largest published layout, yolov5x6, has 141 million."""
MAX_REPEATS = 2_000
"""Maximum number of blocks, repeats included; yolov5x6 has under 200."""
MAX_CHANNELS = 65_536
MAX_STRIDE = 1024
_FITTING: set[str] = set()
"""Layouts whose size this process has already checked."""
MIN_STRIDE = 0.25
"""A stride of 1/4: a map with four times the image's sides."""


class Detector(nn.Module):
    """A detector: layers in the order of their layout, a `Head` at the end."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        sources: Sequence[Sequence[int]],
        layout: dict[str, Any],
        image_multiple: int,
    ) -> None:
        """Connect built `layers`; `sources[i]` are the rows that layer i reads, -1 is the image."""
        super().__init__()
        self.model = nn.ModuleList(layers)
        self.sources = tuple(tuple(s) for s in sources)
        self._mapping = layout
        self.image_multiple = image_multiple
        """Image sides must be multiples of this: the largest stride of any layer, not only of the head."""
        self.names: tuple[str, ...] = tuple(f"class{i}" for i in range(self.head.nc))
        # Only maps that a later row than the next one reads are kept.
        self._kept = frozenset(s for i, row in enumerate(self.sources) for s in row if s != i - 1)

    @property
    def head(self) -> Head:
        """The last layer."""
        head = self.model[-1]
        assert isinstance(head, Head)
        return head

    @property
    def layout(self) -> dict[str, Any]:
        """The layout's mapping with what the head says of itself: enough to build this detector again."""
        return {**self._mapping, **self.head.describe_layout()}

    @property
    def nc(self) -> int:
        """Number of classes."""
        return self.head.nc

    @property
    def stride(self) -> Tensor:
        """[levels] distance in pixels between two cells of each level."""
        return self.head.stride

    def forward(self, images: Tensor) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return raw predictions a level; in eval mode (decoded, raw). See `Head`.

        `images` is [B,3,H,W] in 0..1, H and W multiples of `image_multiple`.
        """
        x: Any = images
        kept: dict[int, Tensor] = {}
        for index, (layer, sources) in enumerate(zip(self.model, self.sources, strict=True)):
            inputs = [x if source == index - 1 else kept[source] for source in sources]
            x = layer(inputs if isinstance(layer, Concat | Head) else inputs[0])
            if index in self._kept:
                kept[index] = x
        return x

    def count_parameters(self) -> int:
        """Return the number of parameters, including frozen ones."""
        return sum(p.numel() for p in self.parameters())

    def fused(self) -> Detector:
        """Return a copy for inference, in eval mode, with every BatchNorm folded into its convolution."""
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
    """Build a detector with fresh weights from torch's global random generator.

    `layout` is a YAML path, the name of a shipped layout, or its mapping. `anchors` replace the layout's: pixels
    (one row per level), or a number per level of square placeholders for AutoAnchor.

    Raises ConfigError for an invalid layout, UsageError for an unreadable file.
    """
    if isinstance(nc, bool) or not isinstance(nc, int) or nc < 1:
        raise ConfigError("nc", nc, "must be at least 1 class")
    mapping = dict(layout) if isinstance(layout, Mapping) else _read(layout)
    plan = parse_layout(mapping, tuple(BLOCKS))
    levels = len(plan.rows[-1].sources)
    chosen = plan.anchors if anchors is None else check_anchors(anchors, levels)
    if plan.anchor_free and anchors is not None:
        raise ConfigError(
            "anchors", anchors, "the layout is anchor-free; leave anchors out of the hyperparameters"
        )

    _check_size(plan, channels, nc, chosen)
    layers, ports = _build_rows(plan, channels)
    layers.append(_build_head(plan, nc, chosen, [ports[s] for s in plan.rows[-1].sources]))
    _set_activation(layers, Conv, plan.activation)
    _set_activation(layers, BottleneckCSP, plan.csp_activation)

    multiple = math.ceil(max(port.stride for port in ports))
    detector = Detector(layers, [row.sources for row in plan.rows], mapping, multiple)
    if names is not None:
        if len(names) != nc:
            raise ConfigError("names", tuple(names), f"{len(names)} names for {nc} classes")
        detector.names = tuple(names)
    return detector


def _build_rows(plan: Layout, channels: int, count: bool = False) -> tuple[list[nn.Module], list[Port]]:
    """Return the layers before the head and their output ports; with `count`, raise ConfigError if too large."""
    ports: list[Port] = []
    layers: list[nn.Module] = []
    parameters = 0
    for row in plan.rows[:-1]:
        inputs = [ports[s] if s >= 0 else Port(channels, 1.0) for s in row.sources]
        built = BLOCKS[row.module](row, plan, inputs)
        if count:
            parameters += sum(parameter.numel() for parameter in built.module.parameters())
            _check_row(row, built.port, parameters)
        layers.append(built.module)
        ports.append(built.port)
    return layers, ports


def _build_head(
    plan: Layout, nc: int, anchors: tuple[tuple[float, ...], ...] | int, maps: Sequence[Port]
) -> Head:
    strides, channels = [port.stride for port in maps], [port.channels for port in maps]
    if plan.anchor_free:
        return AnchorFreeDetect(nc, strides, channels)
    return Detect(nc, _anchors_px(anchors, strides), strides, channels)


def _check_size(plan: Layout, channels: int, nc: int, anchors: tuple[tuple[float, ...], ...] | int) -> None:
    """Raise ConfigError for a layout too large to build, checked with tensors that take no memory."""
    key = repr((plan, channels, nc, anchors))
    if key in _FITTING:  # a search builds the same layout for each candidate
        return
    repeats = sum(plan.repeats(row.number) for row in plan.rows)
    if repeats > MAX_REPEATS:
        raise ConfigError("depth_multiple", plan.depth, f"{repeats} blocks; at most {MAX_REPEATS}")
    try:
        with torch.device("meta"):
            _, ports = _build_rows(plan, channels, count=True)
    except (RuntimeError, OverflowError):  # a size beyond 64 bits
        raise ConfigError("layout", None, "its sizes are beyond any memory; lower the channels") from None
    each = anchors if isinstance(anchors, int) else len(anchors[0]) // 2
    head = sum(ports[s].channels for s in plan.rows[-1].sources if s >= 0) * each * (5 + nc)
    if head > MAX_PARAMETERS:
        raise ConfigError("nc", nc, f"a head of {head} parameters; at most {MAX_PARAMETERS}")
    _FITTING.add(key)


def _check_row(row: Row, port: Port, parameters: int) -> None:
    """Raise ConfigError if the layers up to this row are too large to be trained."""
    if parameters > MAX_PARAMETERS:
        raise ConfigError(
            f"row {row.index}", row.args, f"{parameters} parameters so far; at most {MAX_PARAMETERS}"
        )
    if not 1 <= port.channels <= MAX_CHANNELS:
        raise ConfigError(f"row {row.index}", row.args, f"{port.channels} channels; at most {MAX_CHANNELS}")
    if not MIN_STRIDE <= port.stride <= MAX_STRIDE:
        raise ConfigError(
            f"row {row.index}",
            row.args,
            f"one cell for {port.stride:g} pixels; from {MIN_STRIDE} to {MAX_STRIDE} can be",
        )


def _set_activation(
    layers: Sequence[nn.Module], kind: type[Conv] | type[BottleneckCSP], activation: str
) -> None:
    """Give every block of this kind that has an activation the layout's activation, in this detector only."""
    if activation == DEFAULT_ACTIVATION:
        return
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, kind) and not isinstance(module.act, nn.Identity):
                module.act = ACTIVATIONS[activation]()


def _read(layout: Path | str) -> dict[str, Any]:
    return read_layout(layout if isinstance(layout, Path) else find_config("layouts", layout))


def _anchors_px(anchors: tuple[tuple[float, ...], ...] | int, strides: Sequence[float]) -> Tensor:
    """Return [levels, anchors, 2] pixels; a bare number gives squares with sides from 2 to 8 strides."""
    if isinstance(anchors, int):
        ratio = torch.linspace(1, 3, anchors, device="cpu").exp2()
        sides = torch.tensor(strides, device="cpu").view(-1, 1) * ratio
        return torch.stack((sides, sides), dim=-1)
    return torch.tensor(anchors, device="cpu").view(len(anchors), -1, 2)
