"""Paint a batch of plans on the training device: each output pixel looks up its source pixel in one of the images.

The images lie in one flat tensor of bytes on the device. No function here waits for the device: values that depend on
the plans are computed on the CPU, and values that depend on pixels are never read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from starling.data.augment.device_tables import Tables, load_tables
from starling.data.augment.letterbox import FILL
from starling.data.augment.paint import ImageSource
from starling.data.augment.plan import ItemPlan, QuadPlan, Region, Sample

if TYPE_CHECKING:
    from types import ModuleType

Array = np.ndarray[Any, Any]
Kernel = Literal["auto", "torch", "triton"]

_COPY_BYTES = 64 << 20
"""Images are copied to the device in parts of about this size in bytes."""
_LEVELS = 0.5
"""Maximum mean difference, of 255 levels, at which two kernels count as equal."""
_PIXELS_AT_ONCE = {"cuda": 1 << 22, "cpu": 1}
"""Output pixels, but at least one item, that torch paints at once: more would not fit into a processor's cache."""


class DevicePainter:
    """Paint plans from images that lie on one device."""

    kernel: Literal["torch", "triton"]
    """The implementation in use: torch's own operations, or one fused Triton kernel."""
    reason: str
    """The reason for the kernel in use, for the log."""

    def __init__(
        self,
        pixels: Tensor,
        offsets: Array,
        shapes_hw: Array,
        *,
        dtype: torch.dtype = torch.uint8,
        kernel: Kernel = "auto",
    ) -> None:
        """Take the images: image i has `shapes_hw[i]` pixels, RGB in rows from byte `offsets[i]` of `pixels` [n] uint8.

        Painted images have the type `dtype`: 0 to 255 in uint8, 0 to 1 in a float. `auto` takes Triton on a CUDA device
        if Triton works (it needs a C compiler at run time) and paints the first image as torch does; otherwise torch.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 1:
            raise ValueError(f"pixels: {pixels.dtype} {tuple(pixels.shape)}, must be [n] uint8")
        if len(offsets) < len(shapes_hw) or (offsets[: len(shapes_hw)] + shapes_hw.prod(1) * 3).max() > len(
            pixels
        ):
            raise ValueError("offsets and shapes_hw: name more pixels than there are")
        self.pixels, self.offsets, self.shapes_hw = pixels, offsets, shapes_hw
        self.dtype = dtype
        self._triton: ModuleType | None = None
        self.kernel, self.reason = self._choose(kernel, pixels.device.type)

    @classmethod
    def from_store(
        cls,
        store: ImageSource,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.uint8,
        kernel: Kernel = "auto",
    ) -> Self:
        """Copy all images of a store to the device; they take as many bytes there as in the store."""
        shapes_hw = np.asarray(store.shapes_hw)
        offsets = np.concatenate(([0], np.cumsum(shapes_hw.prod(1) * 3)))
        pixels = torch.empty(int(offsets[-1]), dtype=torch.uint8, device=device)
        first = 0
        while first < len(shapes_hw):
            end = max(int(np.searchsorted(offsets, offsets[first] + _COPY_BYTES)) - 1, first + 1)
            part = np.concatenate([store[index].reshape(-1) for index in range(first, end)])
            pixels[offsets[first] : offsets[end]] = torch.from_numpy(part).to(device)
            first = end
        return cls(pixels, offsets, shapes_hw, dtype=dtype, kernel=kernel)

    def paint(self, plans: Sequence[ItemPlan]) -> Tensor:
        """Return the images [B,3,H,W], channels last in memory, of plans of one output size."""
        return self._paint(plans, self.dtype)

    def paint_quads(self, plans: Sequence[QuadPlan]) -> Tensor:
        """Return the images [B,3,2H,2W], channels last, of plans whose items are all [H,W]."""
        shown = [plan.items[:1] if plan.enlarged else plan.items for plan in plans]
        small = self._paint([item for items in shown for item in items], torch.uint8)
        height, width = small.shape[2:]
        out = torch.full((len(plans), 2 * height, 2 * width, 3), FILL, dtype=torch.uint8, device=small.device)
        images = out.permute(0, 3, 1, 2)
        first = 0
        for image, plan, items in zip(images, plans, shown, strict=True):
            if plan.enlarged:
                large = F.interpolate(small[first : first + 1].float(), scale_factor=2.0, mode="bilinear")
                image.copy_(large[0].round_())
            else:
                for number in range(len(items)):
                    top, left = (number >> 1) * height, (number & 1) * width
                    image[:, top : top + height, left : left + width] = small[first + number]
            first += len(items)
        return images if self.dtype == torch.uint8 else (images.float() / 255).to(self.dtype)

    def _paint(self, plans: Sequence[ItemPlan], dtype: torch.dtype) -> Tensor:
        hw = plans[0].hw
        if any(plan.hw != hw for plan in plans):
            raise ValueError(f"plans: sizes {sorted({plan.hw for plan in plans})}, must be one")
        tables = load_tables(plans, self.offsets, self.shapes_hw, self.pixels.device)
        out = torch.empty((len(plans), *hw, 3), dtype=dtype, device=self.pixels.device)
        if self._triton is None:
            paint_with_torch(tables, self.pixels, out)
        else:
            self._triton.paint_with_triton(tables, self.pixels, out)
        return out.permute(0, 3, 1, 2)

    def _choose(self, kernel: Kernel, device_type: str) -> tuple[Literal["torch", "triton"], str]:
        if kernel == "torch":
            return "torch", "asked for"
        if kernel == "auto" and device_type != "cuda":
            return "torch", f"the device is {device_type}"
        try:
            self._try_triton()
        except Exception as error:  # no package, no compiler, unfit driver: various types
            self._triton = None
            if kernel == "triton":
                raise
            return "torch", f"Triton does not work here: {type(error).__name__}: {error}".splitlines()[0]
        return "triton", "asked for" if kernel == "triton" else "it works here"

    def _try_triton(self) -> None:
        """Take the Triton kernel; raises the kernel's error, or RuntimeError if Triton and torch paint differently."""
        from starling.data.augment import triton_paint

        height, width = self.shapes_hw[0].tolist()
        whole = Region(0, 0, width, height)
        plan = ItemPlan(
            hw=(height, width),
            layers=((Sample(0, whole, np.eye(3), whole, None, False),),),
            share=1.0,
            gains=np.array((1.02, 0.8, 1.1), np.float32),
            labels=np.zeros((0, 5), np.float32),
        )
        expected = self._paint([plan], self.dtype).float()
        self._triton = triton_paint
        difference = (self._paint([plan], self.dtype).float() - expected).abs().mean().item()
        if not difference * (1 if self.dtype == torch.uint8 else 255) < _LEVELS:
            raise RuntimeError("the kernel paints otherwise than torch does")


def paint_with_torch(tables: Tables, pixels: Tensor, out: Tensor) -> None:
    """Paint a batch with torch's own operations into `out` [B,H,W,3]: uint8, or floats that are divided by 255."""
    count, height, width = out.shape[:3]
    at_once = max(_PIXELS_AT_ONCE.get(out.device.type, 1) // (height * width), 1)
    for first in range(0, count, at_once):
        items = slice(first, min(first + at_once, count))
        image = _paint_layer(tables, items, 0, pixels, (height, width))
        if tables.ints.shape[1] > 1:
            share = tables.colours[items, 4].view(-1, 1, 1, 1)
            other = _paint_layer(tables, items, 1, pixels, (height, width))
            image = torch.round(share * image + (1 - share) * other)
        if tables.coloured:
            image = _jitter_colour(image, tables.colours[items])
        out[items] = image.to(torch.uint8) if out.dtype == torch.uint8 else image / 255


def _paint_layer(tables: Tables, items: slice, layer: int, pixels: Tensor, hw: tuple[int, int]) -> Tensor:
    """Return [b,H,W,3] float32 with whole numbers."""
    ints, floats = tables.ints[items, layer], tables.floats[items, layer]
    device = pixels.device
    xs = torch.arange(hw[1], dtype=torch.float32, device=device).view(1, 1, -1)
    ys = torch.arange(hw[0], dtype=torch.float32, device=device).view(1, -1, 1)
    shape = (len(ints), *hw)
    chosen = torch.full(shape, -1, dtype=torch.int64, device=device)
    from_x, from_y = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    for slot in range(ints.shape[1]):
        frames = tables.frames[items, layer, slot]
        frames = frames[frames[:, 2] > frames[:, 0]]
        if not len(frames):
            continue
        (left, top), (right, bottom) = frames[:, :2].min(0).tolist(), frames[:, 2:].max(0).tolist()
        x, y = xs[..., left:right], ys[:, top:bottom]
        whole, real = ints[:, slot, :, None, None], floats[:, slot, :, None, None]
        inside = (x >= whole[:, 0]) & (x < whole[:, 2]) & ((y >= whole[:, 1]) & (y < whole[:, 3]))
        if tables.edged[slot]:
            for column in range(9, 21, 3):
                inside &= real[:, column] * x + (real[:, column + 1] * y + real[:, column + 2]) >= 0
        if tables.masked[slot]:
            inside &= _unmasked(tables.masks, whole, x, y)
        area = (slice(None), slice(top, bottom), slice(left, right))
        for along, seen in zip((from_x, from_y), _seen(real, x, y, bool(tables.turned[slot])), strict=True):
            along[area] = torch.where(inside, seen, along[area])
        chosen[area] = torch.where(inside, slot, chosen[area])
    return _gather(ints, chosen, from_x, from_y, pixels)


def _seen(real: Tensor, x: Tensor, y: Tensor, turned: bool) -> tuple[Tensor, Tensor]:
    """Return x and y in the part for output pixels of samples `real` [b,FLOATS,1,1], to broadcast to [b,h,w]."""
    if not turned:
        return real[:, 0] * x + real[:, 2], real[:, 4] * y + real[:, 5]
    depth = real[:, 6] * x + (real[:, 7] * y + real[:, 8])
    across = real[:, 0] * x + (real[:, 1] * y + real[:, 2])
    down = real[:, 3] * x + (real[:, 4] * y + real[:, 5])
    return across / depth, down / depth


def _unmasked(masks: Tensor, whole: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return [b,h,w] bool: whether the masks of samples `whole` [b,INTS,1,1] are set; True without a mask."""
    position = whole[:, 8] + y.long() * whole[:, 9] + x.long()
    return (whole[:, 9] == 0) | (masks[position.clamp(0, len(masks) - 1)] != 0)


def _gather(ints: Tensor, chosen: Tensor, from_x: Tensor, from_y: Tensor, pixels: Tensor) -> Tensor:
    """Return [b,H,W,3] float32: pixels interpolated from the sample number `chosen` [b,H,W], grey at -1."""
    table = ints[:, :, 4:8].gather(1, chosen.clamp(min=0).view(len(ints), -1, 1).expand(-1, -1, 4))
    base, stride, last_x, last_y = table.view(*chosen.shape, 4).unbind(-1)
    left, top = torch.floor(from_x), torch.floor(from_y)
    share_x, share_y = (from_x - left).unsqueeze(-1), (from_y - top).unsqueeze(-1)
    zero = torch.zeros_like(base)
    columns = [torch.clamp(left.long() + step, zero, last_x) * 3 + base for step in (0, 1)]
    rows = [torch.clamp(top.long() + step, zero, last_y) * stride for step in (0, 1)]
    triples = pixels.as_strided((len(pixels) - 2, 3), (1, 1))  # three bytes from each byte on

    def pixel(row: Tensor, column: Tensor) -> Tensor:
        return triples.index_select(0, (row + column).view(-1)).view(*chosen.shape, 3).float()

    upper, lower = (_between(pixel(row, columns[0]), pixel(row, columns[1]), share_x) for row in rows)
    colour = torch.round(_between(upper, lower, share_y))
    return torch.where((chosen >= 0).unsqueeze(-1), colour, float(FILL))


def _between(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """Return the result of torch.lerp, which is slower here on the CPU."""
    return start + share * (end - start)


def _jitter_colour(image: Tensor, colours: Tensor) -> Tensor:
    """Return images [b,H,W,3] with hue, saturation and value scaled by `colours` [b,COLOURS].

    The steps are those of OpenCV's 8-bit conversions: hue in 180 steps, 12 fractional bits on the way to HSV, rounded
    down on the way back.
    """
    red, green, blue = image.to(torch.int32).unbind(-1)
    value = torch.maximum(torch.maximum(red, green), blue)
    range_ = value - torch.minimum(torch.minimum(red, green), blue)
    per_value = torch.round((255 << 12) / value.clamp(min=1)).to(torch.int32)
    per_range = torch.round((30 << 12) / range_.clamp(min=1)).to(torch.int32)
    saturation = (range_ * per_value + 2048) >> 12
    hue = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, blue - red + 2 * range_, red - green + 4 * range_),
    )
    hue = (hue * per_range + 2048) >> 12
    hue = torch.where(hue < 0, hue + 180, hue)
    gains = colours[:, 1:4, None, None]
    h = hue * gains[:, 0]
    h = torch.floor(torch.where(h >= 180, h - 180, h)) * (6 / 180)
    s = torch.floor(torch.clamp(saturation * gains[:, 1], max=255)) * (1 / 255)
    v = torch.floor(torch.clamp(value * gains[:, 2], max=255)) * (1 / 255)
    # The fraction of the saturation that each channel loses, by the hue in sixths of the circle.
    lost = torch.stack((2 - (h - 3).abs(), (h - 2).abs() - 1, (h - 4).abs() - 1), -1).clamp(0, 1)
    jittered = torch.floor(v.unsqueeze(-1) * (1 - s.unsqueeze(-1) * lost) * 255)
    return torch.where(colours[:, 0].view(-1, 1, 1, 1) > 0, jittered, image)
