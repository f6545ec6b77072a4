"""Blocks that make half of their channels by cheap operations (GhostNet, Han et al. 2019, arXiv 1911.11907)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from starling.model.blocks import C3, Conv

CHEAP_KERNEL = 5
"""Side of the depthwise convolution that derives the ghost channels."""


class GhostConv(nn.Module):
    """Convolve into half of the channels; derive the other half from them, channel by channel."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1, activation: bool = True
    ) -> None:
        """`c_out` is even."""
        super().__init__()
        half = c_out // 2
        self.cv1 = Conv(c_in, half, kernel, stride, activation=activation)
        self.cv2 = Conv(half, half, CHEAP_KERNEL, groups=half, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, c_out, H/stride, W/stride]: the convolved half, then its ghosts."""
        primary = self.cv1(x)
        return torch.cat((primary, self.cv2(primary)), dim=1)


class GhostBottleneck(nn.Module):
    """Two ghost convolutions, the second linear, added to the input (figure 3 of the paper, stride 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // 2
        # The one in the middle is where a stride would go; the numbers are part of every entry's name.
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
