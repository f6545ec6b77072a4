"""Turn the rows of a layout into layers, with a table of one builder per module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from starling.core.errors import ConfigError
from starling.model.blocks import (
    C3,
    HEADS,
    SPP,
    SPPF,
    Bottleneck,
    BottleneckCSP,
    C3Ghost,
    C3Transformer,
    Concat,
    Conv,
    Focus,
    GhostConv,
)
from starling.model.layout import Layout, Row

MAX_KERNELS = 16
"""Maximum number of parallel pools; published layouts have three."""


@dataclass(frozen=True, slots=True)
class Port:
    """The output of a layer: a map with `channels`, one cell every `stride` pixels."""

    channels: int
    stride: float


@dataclass(frozen=True, slots=True)
class Built:
    """A layer and its output."""

    module: nn.Module
    port: Port


Builder = Callable[[Row, Layout, Sequence[Port]], Built]


def _integers(row: Row, at_least: int, at_most: int) -> list[int]:
    """Return the row's args as integers (True is 1); raises ConfigError for a wrong number or type of args."""
    if not at_least <= len(row.args) <= at_most:
        raise ConfigError(f"row {row.index}", row.args, f"{row.module} takes {at_least} to {at_most} args")
    for arg in row.args:
        if not isinstance(arg, int) or not 0 <= arg <= 65536:
            raise ConfigError(f"row {row.index}", arg, f"{row.module} takes whole numbers, 0 or above")
    return [int(arg) for arg in row.args]


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65536


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
    c_out, kernel, stride, padding, groups = _convolution(row, layout, port.channels)

    def conv(c_in: int) -> nn.Module:
        return Conv(c_in, c_out, kernel, stride, padding, groups)

    module = _repeat(row, layout, conv(port.channels), lambda: conv(c_out))
    return Built(module, Port(c_out, port.stride * stride ** layout.repeats(row.number)))


def _build_focus(row: Row, layout: Layout, inputs: Sequence[Port]) -> Built:
    """Args: those of Conv, applied to four times the channels at half the size."""
    port = _single(row, inputs)
    if row.number != 1:
        raise ConfigError(f"row {row.index}", row.number, "Focus stands once: number must be 1")
    c_out, kernel, stride, padding, groups = _convolution(row, layout, 4 * port.channels)
    module = Focus(port.channels, c_out, kernel, stride, padding, groups)
    return Built(module, Port(c_out, port.stride * 2 * stride))


def _convolution(row: Row, layout: Layout, c_in: int) -> tuple[int, int, int, int | None, int]:
    """Return output channels, kernel, stride, padding (None: half the kernel) and groups; raises ConfigError."""
    args = _integers(row, 1, 5)
    c_out = _channels_out(row, layout, args[0])
    kernel, stride, groups = _at(args, 1, 1), _at(args, 2, 1), _at(args, 4, 1)
    padding = args[3] if len(args) > 3 else None
    if not kernel or not stride or not groups or c_out % groups or c_in % groups:
        raise ConfigError(f"row {row.index}", row.args, "kernel, stride and groups do not fit")
    return c_out, kernel, stride, padding, groups


def _build_ghost_conv(row: Row, layout: Layout, inputs: Sequence[Port]) -> Built:
    """Args: channels (even), kernel [1], stride [1]."""
    port = _single(row, inputs)
    args = _integers(row, 1, 3)
    c_out = _channels_out(row, layout, args[0])
    kernel, stride = _at(args, 1, 1), _at(args, 2, 1)
    if not kernel or not stride:
        raise ConfigError(f"row {row.index}", row.args, "kernel and stride must be at least 1")
    module = _repeat(
        row,
        layout,
        GhostConv(port.channels, c_out, kernel, stride),
        lambda: GhostConv(c_out, c_out, kernel, stride),
    )
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
    """Args: channels, shortcut [true]; `number` is the number of bottlenecks inside."""
    port, c_out, shortcut = _cross_stage(row, layout, inputs)
    return Built(C3(port.channels, c_out, layout.repeats(row.number), shortcut), Port(c_out, port.stride))


def _build_bottleneck_csp(row: Row, layout: Layout, inputs: Sequence[Port]) -> Built:
    """Args: channels, shortcut [true]; `number` is the number of bottlenecks inside."""
    port, c_out, shortcut = _cross_stage(row, layout, inputs)
    module = BottleneckCSP(port.channels, c_out, layout.repeats(row.number), shortcut)
    return Built(module, Port(c_out, port.stride))


def _build_c3_ghost(row: Row, layout: Layout, inputs: Sequence[Port]) -> Built:
    """Args: channels, shortcut [true] without effect: a ghost bottleneck always adds its input."""
    port, c_out, _ = _cross_stage(row, layout, inputs)
    return Built(C3Ghost(port.channels, c_out, layout.repeats(row.number)), Port(c_out, port.stride))


def _build_c3_transformer(row: Row, layout: Layout, inputs: Sequence[Port]) -> Built:
    """Args: channels, shortcut [true] without effect: attention always adds its input."""
    port, c_out, _ = _cross_stage(row, layout, inputs)
    if c_out // 2 % HEADS:
        raise ConfigError(f"row {row.index}", c_out, f"C3TR needs a multiple of {2 * HEADS} channels")
    return Built(C3Transformer(port.channels, c_out, layout.repeats(row.number)), Port(c_out, port.stride))


def _cross_stage(row: Row, layout: Layout, inputs: Sequence[Port]) -> tuple[Port, int, bool]:
    port = _single(row, inputs)
    args = _integers(row, 1, 2)
    return port, _channels_out(row, layout, args[0]), bool(_at(args, 1, True))


def _build_spp(row: Row, layout: Layout, inputs: Sequence[Port]) -> Built:
    """Args: channels, list of kernels [5, 9, 13]."""
    port = _single(row, inputs)
    channels, kernels = (*row.args, [5, 9, 13])[:2] if len(row.args) in (1, 2) else (None, None)
    if not _is_size(channels) or not isinstance(kernels, list | tuple) or not kernels:
        raise ConfigError(f"row {row.index}", row.args, "SPP takes channels and a list of kernels")
    if len(kernels) > MAX_KERNELS or not all(_is_size(kernel) and kernel % 2 for kernel in kernels):
        raise ConfigError(
            f"row {row.index}", kernels, f"the pools of SPP need odd kernels, {MAX_KERNELS} at most"
        )
    c_out = _channels_out(row, layout, channels)
    return Built(SPP(port.channels, c_out, kernels), Port(c_out, port.stride))


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
    """Args: size [None], scale, mode; only an integer scale and `nearest` are supported."""
    port = _single(row, inputs)
    size, scale, mode = row.args if len(row.args) == 3 else ("?", None, None)
    if size not in (None, "None") or not isinstance(scale, int) or scale < 1 or mode != "nearest":
        raise ConfigError(f"row {row.index}", row.args, "Upsample takes [None, whole scale, nearest]")
    return Built(
        nn.Upsample(scale_factor=float(scale), mode="nearest"), Port(port.channels, port.stride / scale)
    )


def _build_max_pool(row: Row, layout: Layout, inputs: Sequence[Port]) -> Built:
    """Args: kernel, stride [kernel], padding [0]."""
    port = _single(row, inputs)
    args = _integers(row, 1, 3)
    kernel, stride, padding = args[0], _at(args, 1, args[0]), _at(args, 2, 0)
    if not kernel or not stride or padding * 2 > kernel:
        raise ConfigError(f"row {row.index}", row.args, "kernel, stride and padding do not fit")
    return Built(nn.MaxPool2d(kernel, stride, padding), Port(port.channels, port.stride * stride))


def _build_zero_pad(row: Row, layout: Layout, inputs: Sequence[Port]) -> Built:
    """Args: a list of the cells to add: left, right, above, below."""
    port = _single(row, inputs)
    sides = row.args[0] if len(row.args) == 1 else None
    if (
        not isinstance(sides, list | tuple)
        or len(sides) != 4
        or not all(s == 0 or _is_size(s) for s in sides)
    ):
        raise ConfigError(f"row {row.index}", row.args, "ZeroPad2d takes [[left, right, above, below]]")
    left, right, above, below = sides
    return Built(nn.ZeroPad2d((left, right, above, below)), port)


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
    "Focus": _build_focus,
    "GhostConv": _build_ghost_conv,
    "Bottleneck": _build_bottleneck,
    "BottleneckCSP": _build_bottleneck_csp,
    "C3": _build_c3,
    "C3Ghost": _build_c3_ghost,
    "C3TR": _build_c3_transformer,
    "SPP": _build_spp,
    "SPPF": _build_sppf,
    "nn.MaxPool2d": _build_max_pool,
    "nn.ZeroPad2d": _build_zero_pad,
    "nn.Upsample": _build_upsample,
    "Upsample": _build_upsample,
    "Concat": _build_concat,
    "Detect": _build_detect,
}
"""All modules that a layout may name."""
