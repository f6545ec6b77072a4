"""Paint a batch of plans with one fused Triton kernel: images are read once and written once.

Importing this module needs the triton package. starling.data.augment.device_paint explains the arithmetic.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from starling.data.augment.device_tables import COLOURS, FLOATS, INTS, Tables
from starling.data.augment.letterbox import FILL

BLOCK_HEIGHT, BLOCK_WIDTH = 8, 64
"""Height and width in output pixels of the block that one program paints."""

_FILL = tl.constexpr(FILL)
_INTS, _FLOATS, _COLOURS = tl.constexpr(INTS), tl.constexpr(FLOATS), tl.constexpr(COLOURS)


def paint_with_triton(tables: Tables, pixels: Tensor, out: Tensor) -> None:
    """Paint a batch into `out` [B,H,W,3]: uint8, or a float type with values divided by 255."""
    count, height, width = out.shape[:3]
    grid = (triton.cdiv(width, BLOCK_WIDTH), triton.cdiv(height, BLOCK_HEIGHT), count)
    paint_kernel[grid](
        pixels,
        tables.ints,
        tables.floats,
        tables.colours,
        tables.masks,
        out,
        height,
        width,
        tables.ints.shape[2],
        LAYERS=tables.ints.shape[1],
        TURNED=bool(tables.turned.any()),
        EDGED=bool(tables.edged.any()),
        MASKED=bool(tables.masked.any()),
        COLOURED=tables.coloured,
        NORMALISED=out.dtype != torch.uint8,
        ROWS=BLOCK_HEIGHT,
        COLUMNS=BLOCK_WIDTH,
    )


@triton.jit(do_not_specialize=["slots"])  # type: ignore[untyped-decorator]
def paint_kernel(
    pixels,
    ints,
    floats,
    colours,
    masks,
    out,
    height,
    width,
    slots,
    LAYERS: tl.constexpr,  # noqa: N803
    TURNED: tl.constexpr,  # noqa: N803
    EDGED: tl.constexpr,  # noqa: N803
    MASKED: tl.constexpr,  # noqa: N803
    COLOURED: tl.constexpr,  # noqa: N803
    NORMALISED: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """Paint ROWS x COLUMNS pixels of item number program_id(2)."""
    left = tl.program_id(0) * COLUMNS
    top = tl.program_id(1) * ROWS
    item = tl.program_id(2)
    column = (left + tl.arange(0, COLUMNS))[None, :]
    row = (top + tl.arange(0, ROWS))[:, None]
    red, green, blue = _layer(
        pixels,
        ints,
        floats,
        masks,
        item * LAYERS,
        slots,
        left,
        top,
        column,
        row,
        TURNED,
        EDGED,
        MASKED,
        ROWS,
        COLUMNS,
    )
    own = colours + item * _COLOURS
    if LAYERS == 2:
        red2, green2, blue2 = _layer(
            pixels, ints, floats, masks, item * 2 + 1, slots, left, top, column, row, TURNED, EDGED, MASKED, ROWS,
            COLUMNS,
        )  # fmt: skip
        share = tl.load(own + 4)
        red = _rounded(share * red + (1 - share) * red2)
        green = _rounded(share * green + (1 - share) * green2)
        blue = _rounded(share * blue + (1 - share) * blue2)
    if COLOURED:
        red3, green3, blue3 = _jitter(red, green, blue, tl.load(own + 1), tl.load(own + 2), tl.load(own + 3))
        changes = tl.load(own) > 0
        red = tl.where(changes, red3, red)
        green = tl.where(changes, green3, green)
        blue = tl.where(changes, blue3, blue)
    if NORMALISED:
        red, green, blue = red / 255.0, green / 255.0, blue / 255.0
    there = (row < height) & (column < width)
    place = out + ((item.to(tl.int64) * height + row) * width + column) * 3
    kind = out.dtype.element_ty
    tl.store(place, red.to(kind), mask=there)
    tl.store(place + 1, green.to(kind), mask=there)
    tl.store(place + 2, blue.to(kind), mask=there)


@triton.jit
def _layer(
    pixels,
    ints,
    floats,
    masks,
    layer,
    slots,
    left,
    top,
    column,
    row,
    TURNED: tl.constexpr,  # noqa: N803
    EDGED: tl.constexpr,  # noqa: N803
    MASKED: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """Return red, green and blue [ROWS,COLUMNS] float32, whole numbers, of one layer of one item."""
    x, y = column.to(tl.float32), row.to(tl.float32)
    from_x = tl.zeros((ROWS, COLUMNS), tl.float32)
    from_y = tl.zeros((ROWS, COLUMNS), tl.float32)
    base = tl.zeros((ROWS, COLUMNS), tl.int64)
    stride = tl.zeros((ROWS, COLUMNS), tl.int32)
    last_x = tl.zeros((ROWS, COLUMNS), tl.int32)
    last_y = tl.zeros((ROWS, COLUMNS), tl.int32)
    covered = tl.zeros((ROWS, COLUMNS), tl.int32)
    for slot in range(slots):
        whole = ints + (layer * slots + slot) * _INTS
        first_column = tl.load(whole).to(tl.int32)
        first_row = tl.load(whole + 1).to(tl.int32)
        end_column = tl.load(whole + 2).to(tl.int32)
        end_row = tl.load(whole + 3).to(tl.int32)
        meets = (first_column < left + COLUMNS) & (end_column > left)
        meets = meets & (first_row < top + ROWS) & (end_row > top)
        if meets:
            real = floats + (layer * slots + slot) * _FLOATS
            inside = (column >= first_column) & (column < end_column) & (row >= first_row) & (row < end_row)
            if EDGED:
                for edge in tl.static_range(4):
                    inside = inside & _within(real + 9 + 3 * edge, x, y)
            if MASKED:
                mask_stride = tl.load(whole + 9)
                position = tl.load(whole + 8) + row * mask_stride + column
                asked = inside & (mask_stride > 0)
                inside = inside & (tl.load(masks + position, mask=asked, other=1) > 0)
            if TURNED:
                depth = _linear(real + 6, x, y)
                seen_x = _linear(real, x, y) / depth
                seen_y = _linear(real + 3, x, y) / depth
            else:
                seen_x = tl.load(real) * x + tl.load(real + 2)
                seen_y = tl.load(real + 4) * y + tl.load(real + 5)
            from_x = tl.where(inside, seen_x, from_x)
            from_y = tl.where(inside, seen_y, from_y)
            base = tl.where(inside, tl.load(whole + 4), base)
            stride = tl.where(inside, tl.load(whole + 5).to(tl.int32), stride)
            last_x = tl.where(inside, tl.load(whole + 6).to(tl.int32), last_x)
            last_y = tl.where(inside, tl.load(whole + 7).to(tl.int32), last_y)
            covered = tl.where(inside, 1, covered)
    floor_x, floor_y = tl.floor(from_x), tl.floor(from_y)
    share_x, share_y = from_x - floor_x, from_y - floor_y
    near_x = tl.minimum(tl.maximum(floor_x.to(tl.int32), 0), last_x) * 3
    far_x = tl.minimum(tl.maximum(floor_x.to(tl.int32) + 1, 0), last_x) * 3
    near_y = base + tl.minimum(tl.maximum(floor_y.to(tl.int32), 0), last_y).to(tl.int64) * stride
    far_y = base + tl.minimum(tl.maximum(floor_y.to(tl.int32) + 1, 0), last_y).to(tl.int64) * stride
    shown = covered > 0
    red = _channel(pixels, near_x, far_x, near_y, far_y, share_x, share_y, shown)
    green = _channel(pixels + 1, near_x, far_x, near_y, far_y, share_x, share_y, shown)
    blue = _channel(pixels + 2, near_x, far_x, near_y, far_y, share_x, share_y, shown)
    return red, green, blue


@triton.jit
def _linear(row_of_matrix, x, y):
    """Return a·x + b·y + c."""
    return tl.load(row_of_matrix) * x + (tl.load(row_of_matrix + 1) * y + tl.load(row_of_matrix + 2))


@triton.jit
def _within(edge, x, y):
    return _linear(edge, x, y) >= 0


@triton.jit
def _channel(pixels, near_x, far_x, near_y, far_y, share_x, share_y, shown):
    """Return one channel, interpolated between four pixels and rounded; grey outside of all samples."""
    a = tl.load(pixels + near_y + near_x, mask=shown, other=_FILL).to(tl.float32)
    b = tl.load(pixels + near_y + far_x, mask=shown, other=_FILL).to(tl.float32)
    c = tl.load(pixels + far_y + near_x, mask=shown, other=_FILL).to(tl.float32)
    d = tl.load(pixels + far_y + far_x, mask=shown, other=_FILL).to(tl.float32)
    upper = a + share_x * (b - a)
    lower = c + share_x * (d - c)
    return _rounded(upper + share_y * (lower - upper))


@triton.jit
def _rounded(value):
    """Return the nearest whole number, ties to even: a float32 near 12582912 (1.5 · 2^23) has no fractional digits."""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def _jitter(red, green, blue, hue_gain, saturation_gain, value_gain):
    """Return the channels with hue, saturation and value scaled, in the steps of OpenCV's 8-bit conversions."""
    r, g, b = red.to(tl.int32), green.to(tl.int32), blue.to(tl.int32)
    value = tl.maximum(tl.maximum(r, g), b)
    spread = value - tl.minimum(tl.minimum(r, g), b)
    per_value = (2 * (255 << 12) + value) // tl.maximum(2 * value, 1)
    per_spread = (2 * (30 << 12) + spread) // tl.maximum(2 * spread, 1)
    saturation = (spread * per_value + 2048) >> 12
    hue = tl.where(value == r, g - b, tl.where(value == g, b - r + 2 * spread, r - g + 4 * spread))
    hue = (hue * per_spread + 2048) >> 12
    hue = tl.where(hue < 0, hue + 180, hue)
    h = hue.to(tl.float32) * hue_gain
    h = tl.floor(tl.where(h >= 180.0, h - 180.0, h)) * (6 / 180)
    s = tl.floor(tl.minimum(saturation.to(tl.float32) * saturation_gain, 255.0)) * (1 / 255)
    v = tl.floor(tl.minimum(value.to(tl.float32) * value_gain, 255.0)) * (1 / 255)
    # The fraction of the saturation that each channel loses, by the hue in sixths of the circle.
    red = v * (1 - s * _clamped(2 - tl.abs(h - 3)))
    green = v * (1 - s * _clamped(tl.abs(h - 2) - 1))
    blue = v * (1 - s * _clamped(tl.abs(h - 4) - 1))
    return tl.floor(red * 255), tl.floor(green * 255), tl.floor(blue * 255)


@triton.jit
def _clamped(value):
    return tl.minimum(tl.maximum(value, 0.0), 1.0)
