"""What goes into a detector: sizes that its strides divide, and pixels as it takes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from starling.data.augment.letterbox import Size
from starling.device import Compute


def fit_stride(size: int, stride: int, say: Callable[[str], None]) -> int:
    """Return `size` rounded up to a multiple of `stride`, at least two of them."""
    fitted = max(-(-size // stride), 2) * stride
    if fitted != size:
        say(f"--imgsz {size} is rounded up to {fitted}, a multiple of the layout's stride {stride}")
    return fitted


def fit_size(size_hw: tuple[int, int], stride: int, say: Callable[[str], None]) -> tuple[int, int]:
    """Return height and width rounded up to multiples of `stride`, at least two of them, and say what changes."""
    height = fit_stride(size_hw[0], stride, say)
    return height, height if size_hw[1] == size_hw[0] else fit_stride(size_hw[1], stride, say)


def to_input(images: Tensor, compute: Compute, scaled_hw: Size | None = None) -> Tensor:
    """Return images [B,3,H,W] as 0..1 on the device, channels last, resized to `scaled_hw` if given.

    uint8 becomes float32; what a painter has put there already stays as it is.
    """
    pixels = images.to(compute.device, non_blocking=True)
    if images.dtype == torch.uint8:
        pixels = pixels.to(torch.float32, memory_format=torch.channels_last).div_(255)
    if scaled_hw is None:
        return pixels
    return functional.interpolate(pixels, scaled_hw, mode="bilinear", align_corners=False)
