"""The layers that a layout names. Do not rename attributes: they are the keys of every YOLOv5 state dict."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

BN_EPS = 1e-3
BN_MOMENTUM = 0.03

DEFAULT_ACTIVATION = "nn.SiLU()"
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "nn.SiLU()": lambda: nn.SiLU(inplace=True),
    "nn.LeakyReLU(0.1)": lambda: nn.LeakyReLU(0.1, inplace=True),
    "nn.Hardswish()": lambda: nn.Hardswish(inplace=True),
    "nn.ReLU()": lambda: nn.ReLU(inplace=True),
}
"""Allowed values of a layout's `activation`, verbatim. A state dict does not contain the activation."""


class Conv(nn.Module):
    """Convolve, normalise, activate: [B,c_in,H,W] -> [B,c_out,H/stride,W/stride]."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int = 1,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        activation: bool = True,
    ) -> None:
        super().__init__()
        pad = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, pad, groups=groups, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(c_out, eps=BN_EPS, momentum=BN_MOMENTUM)
        self.act: nn.Module = ACTIVATIONS[DEFAULT_ACTIVATION]() if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the activated feature map."""
        return self.act(self.bn(self.conv(x)))

    def fuse(self) -> None:
        """Fold the normalisation's running statistics into the convolution; for inference only."""
        if isinstance(self.bn, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv.eval(), self.bn.eval())
            self.bn = nn.Identity()


class Bottleneck(nn.Module):
    """A 1x1 and a 3x3 convolution, with a shortcut if the shapes allow it (He et al. 2015)."""

    def __init__(
        self, c_in: int, c_out: int, shortcut: bool = True, groups: int = 1, expansion: float = 0.5
    ) -> None:
        super().__init__()
        hidden = int(c_out * expansion)
        self.cv1 = Conv(c_in, hidden, 1)
        self.cv2 = Conv(hidden, c_out, 3, groups=groups)
        self.add = shortcut and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the input's height and width."""
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class C3(nn.Module):
    """Cross-stage partial block of three convolutions around `number` bottlenecks (Wang et al. 2019)."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        number: int = 1,
        shortcut: bool = True,
        groups: int = 1,
        expansion: float = 0.5,
    ) -> None:
        super().__init__()
        hidden = int(c_out * expansion)
        self.cv1 = Conv(c_in, hidden)
        self.cv2 = Conv(c_in, hidden)
        self.cv3 = Conv(2 * hidden, c_out)
        self.m: nn.Module = nn.Sequential(
            *(Bottleneck(hidden, hidden, shortcut, groups, expansion=1.0) for _ in range(number))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the input's height and width."""
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), dim=1))


class BottleneckCSP(nn.Module):
    """The cross-stage partial block of 2020: BatchNorm on the joined branches (Wang et al. 2019, arXiv 1911.11929)."""

    def __init__(self, c_in: int, c_out: int, number: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        hidden = c_out // 2
        self.cv1 = Conv(c_in, hidden)
        self.cv2 = nn.Conv2d(c_in, hidden, 1, bias=False)
        self.cv3 = nn.Conv2d(hidden, hidden, 1, bias=False)
        self.cv4 = Conv(2 * hidden, c_out)
        self.bn = nn.BatchNorm2d(2 * hidden, eps=BN_EPS, momentum=BN_MOMENTUM)
        self.act: nn.Module = ACTIVATIONS[DEFAULT_ACTIVATION]()
        self.m = nn.Sequential(*(Bottleneck(hidden, hidden, shortcut, expansion=1.0) for _ in range(number)))

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the input's height and width."""
        joined = torch.cat((self.cv3(self.m(self.cv1(x))), self.cv2(x)), dim=1)
        return self.cv4(self.act(self.bn(joined)))


class Focus(nn.Module):
    """Fold each square of 2x2 pixels into the channels, then convolve: [B,c,H,W] -> [B,c_out,H/2,W/2].

    H and W are even. The channels of the upper left pixels come first, then lower left, upper right, lower right, as in
    YOLOX (Ge et al. 2021, arXiv 2107.08430), which adopted the block.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int = 1,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.conv = Conv(4 * c_in, c_out, kernel, stride, padding, groups)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the input's height and width divided by 2 and by the convolution's stride."""
        upper, lower = x[..., ::2, :], x[..., 1::2, :]
        return self.conv(
            torch.cat((upper[..., ::2], lower[..., ::2], upper[..., 1::2], lower[..., 1::2]), dim=1)
        )


class SPP(nn.Module):
    """Pool at several scales in parallel (He et al. 2014, arXiv 1406.4729)."""

    def __init__(self, c_in: int, c_out: int, kernels: Sequence[int] = (5, 9, 13)) -> None:
        super().__init__()
        hidden = c_in // 2
        self.cv1 = Conv(c_in, hidden)
        self.cv2 = Conv(hidden * (len(kernels) + 1), c_out)
        self.m = nn.ModuleList(nn.MaxPool2d(kernel, stride=1, padding=kernel // 2) for kernel in kernels)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the input's height and width."""
        x = self.cv1(x)
        return self.cv2(torch.cat((x, *(pool(x) for pool in self.m)), dim=1))


class SPPF(nn.Module):
    """Pool at three growing scales by applying one small pool three times (He et al. 2014, in sequence)."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 5) -> None:
        super().__init__()
        hidden = c_in // 2
        self.cv1 = Conv(c_in, hidden)
        self.cv2 = Conv(hidden * 4, c_out)
        self.m = nn.MaxPool2d(kernel, stride=1, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the input's height and width."""
        scales = [self.cv1(x)]
        for _ in range(3):
            scales.append(self.m(scales[-1]))
        return self.cv2(torch.cat(scales, dim=1))


class Concat(nn.Module):
    """Join maps of equal height and width along the channels."""

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return [B, sum of channels, H, W]."""
        return torch.cat(tuple(maps), dim=1)


CHEAP_KERNEL = 5
"""Side of the depthwise convolution that derives the ghost channels."""


class GhostConv(nn.Module):
    """Convolve into half of the output channels; derive the other half from them, channel by channel."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1, activation: bool = True
    ) -> None:
        """`c_out` must be even."""
        super().__init__()
        half = c_out // 2
        self.cv1 = Conv(c_in, half, kernel, stride, activation=activation)
        self.cv2 = Conv(half, half, CHEAP_KERNEL, groups=half, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, c_out, H/stride, W/stride]: the convolved half, then the derived half."""
        primary = self.cv1(x)
        return torch.cat((primary, self.cv2(primary)), dim=1)


class GhostBottleneck(nn.Module):
    """Two ghost convolutions, the second without activation, added to the input (figure 3 of the paper, stride 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // 2
        # The Identity is in the place of a strided convolution, because the indices are part of the state dict's keys.
        self.conv = nn.Sequential(
            GhostConv(channels, hidden), nn.Identity(), GhostConv(hidden, channels, activation=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the input's shape."""
        return x + self.conv(x)


class C3Ghost(C3):
    """A cross-stage partial block around ghost bottlenecks."""

    def __init__(self, c_in: int, c_out: int, number: int = 1) -> None:
        super().__init__(c_in, c_out, number=0)
        self.m = nn.Sequential(*(GhostBottleneck(c_out // 2) for _ in range(number)))


HEADS = 4


class TransformerLayer(nn.Module):
    """Self-attention, then two linear layers over each cell's channels; both add to their input, unnormalised."""

    def __init__(self, channels: int, heads: int = HEADS) -> None:
        super().__init__()
        self.q = nn.Linear(channels, channels, bias=False)
        self.k = nn.Linear(channels, channels, bias=False)
        self.v = nn.Linear(channels, channels, bias=False)
        self.ma = nn.MultiheadAttention(channels, heads)
        self.fc1 = nn.Linear(channels, channels, bias=False)
        self.fc2 = nn.Linear(channels, channels, bias=False)

    def forward(self, cells: Tensor) -> Tensor:
        """Take and return [cells, B, channels]."""
        attended, _ = self.ma(self.q(cells), self.k(cells), self.v(cells), need_weights=False)
        cells = cells + attended
        return cells + self.fc2(self.fc1(cells))


class TransformerBlock(nn.Module):
    """Attention layers over all cells of a map; a linear layer replaces a position embedding."""

    def __init__(self, channels: int, number: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)
        self.tr = nn.Sequential(*(TransformerLayer(channels) for _ in range(number)))

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the input's shape; memory grows with the square of its cells."""
        cells = x.flatten(2).permute(2, 0, 1)
        return self.tr(cells + self.linear(cells)).permute(1, 2, 0).reshape(x.shape)


class C3Transformer(C3):
    """A cross-stage partial block around attention."""

    def __init__(self, c_in: int, c_out: int, number: int = 1) -> None:
        super().__init__(c_in, c_out, number=0)
        self.m = TransformerBlock(c_out // 2, number)
