"""Greedy suppression: of candidates in the order of their confidence, keep each that no kept one overlaps too much.

Two ways to the same boxes. `suppress_each` takes image by image in NumPy: what it works on stays in the cache of a CPU.
`suppress_together` takes all images in a few large steps, as a GPU wants them.

Both settle a block of candidates at a time: what one kept before overlaps is gone already, so most of a block stays,
and what the block keeps is held against all that follow.
"""

from __future__ import annotations

import math
import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HOST_CHUNK = 384
"""Candidates of an image that are looked at before it is known whether more are needed."""
HOST_BLOCK = 128
HOST_PIECE = 128
"""Kept boxes that new candidates are held against at once; what the first ones overlap, the others need not see."""
DEVICE_BLOCK = 512

Floats = NDArray[np.float32]
_AREA, _GROUP, _PLACE = 4, 5, 6
"""Rows of a table of candidates, after the four corners."""


def below(limit: float) -> float:
    """Return the largest float32 up to `limit`: a float32 is above both or above none."""
    nearest = np.float32(limit)
    return float(nearest if float(nearest) <= limit else np.nextafter(nearest, np.float32(-np.inf)))


# --- image by image -------------------------------------------------------------------------------------


def suppress_each(candidates: Tensor, iou: float, limit: int, *, agnostic: bool) -> list[Tensor]:
    """Return what stays of each image, [n,6], n at most `limit`.

    `candidates` [B,n,6] are xyxy, confidence, class in falling order of confidence, which is 0 where there is none.
    A box goes where it overlaps one of its class (`agnostic`: of any) by more than `iou`.
    """
    over = below(iou)
    with np.errstate(divide="ignore", invalid="ignore"):  # a box without area overlaps nothing
        return [
            torch.from_numpy(image[_suppress(_table(image, agnostic), over, limit)])
            for image in candidates.numpy()
        ]


def _table(image: Floats, agnostic: bool) -> Floats:
    """Turn [n,6] into a table [7,n] without the columns that hold no candidate."""
    image = image[: np.count_nonzero(image[:, 4])]
    table = np.empty((7, len(image)), np.float32)
    table[:4] = image[:, :4].T
    table[_AREA] = (table[2] - table[0]) * (table[3] - table[1])
    table[_GROUP] = 0 if agnostic else image[:, 5]
    table[_PLACE] = np.arange(len(image))
    return table


def _suppress(table: Floats, over: float, limit: int) -> NDArray[np.intp]:
    """Return the places of the first `limit` candidates that stay."""
    places: list[Floats] = [np.empty(0, np.float32)]
    pieces: list[Floats] = []
    count = 0
    for begin in range(0, table.shape[1], HOST_CHUNK):
        rest = table[:, begin : begin + HOST_CHUNK]
        for piece in pieces:
            rest = _without(rest, piece, over)
        while rest.shape[1] and count < limit:
            block, rest = rest[:, :HOST_BLOCK], rest[:, HOST_BLOCK:]
            new = block.compress(_first_come(block, over), axis=1)
            places.append(new[_PLACE])
            count += new.shape[1]
            rest = _without(rest, new, over)
            if pieces and pieces[-1].shape[1] < HOST_PIECE:
                pieces[-1] = np.concatenate((pieces[-1], new), axis=1)
            else:
                pieces.append(new)
        if count >= limit:
            break
    return np.concatenate(places)[:limit].astype(np.intp)


def _without(rest: Floats, kept: Floats, over: float) -> Floats:
    """Return the columns of a table that no kept one overlaps."""
    if not rest.shape[1]:
        return rest
    inter, near = _near(kept, rest, over)
    free = np.ones(rest.shape[1], dtype=bool)
    free[_pairs(kept, rest, inter, near, over)[1]] = False
    return rest.compress(free, axis=1)


def _first_come(block: Floats, over: float) -> NDArray[np.bool_]:
    """Return which columns stay when each that stays takes those after it that it overlaps."""
    inter, near = _near(block, block, over)
    near &= _LATER[: len(near), : len(near)]
    stays = [True] * len(near)
    first, second = _pairs(block, block, inter, near, over)
    for one, other in zip(first.tolist(), second.tolist(), strict=True):
        if stays[one]:
            stays[other] = False
    return np.array(stays)


def _near(a: Floats, b: Floats, over: float) -> tuple[Floats, NDArray[np.bool_]]:
    """Return [k,n] what the columns of two tables share, and where that may be enough."""
    high, low, zeros = _memory(a.shape[1], b.shape[1])
    np.minimum(a[2:4, :, None], b[2:4, None], out=high)
    np.maximum(a[:2, :, None], b[:2, None], out=low)
    high -= low
    # A table of zeros: with a number it takes several times longer.
    inter = np.maximum(high[0], zeros, out=high[0])
    inter *= high[1]  # below 0 where the height is: not over anything
    # Who shares much of the union shares as much of the first box.
    return inter, inter > (a[_AREA] * np.float32(over * _NEARLY))[:, None]


def _pairs(
    a: Floats, b: Floats, inter: Floats, near: NDArray[np.bool_], over: float
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return which of the pairs that are near are of one group and overlap by more than `over`, row by row."""
    pair = np.flatnonzero(near)  # few, so all else is asked of these alone
    first, second = np.divmod(pair, b.shape[1])
    shared = inter.ravel()[pair]
    wanted = shared / (a[_AREA, first] + b[_AREA, second] - shared) > over
    wanted &= a[_GROUP, first] == b[_GROUP, second]
    return first[wanted], second[wanted]


_LATER = np.triu(np.ones((HOST_BLOCK, HOST_BLOCK), dtype=bool), 1)
_NEARLY = 0.999
"""Leaves room for rounding."""
_own = threading.local()


def _memory(rows: int, columns: int) -> tuple[Floats, Floats, Floats]:
    """Return two pairs of tables [2,rows,columns] and one of zeros, this thread's until it asks again.

    Fresh pages would take longer to touch than the arithmetic.
    """
    size = rows * columns
    if getattr(_own, "size", 0) < size:
        _own.size, _own.floats, _own.zeros = size, np.empty(4 * size, np.float32), np.zeros(size, np.float32)
    high, low = _own.floats[: 4 * size].reshape(2, 2, rows, columns)
    return high, low, _own.zeros[:size].reshape(rows, columns)


# --- all images together --------------------------------------------------------------------------------


def suppress_together(candidates: Tensor, iou: float, limit: int, *, agnostic: bool) -> list[Tensor]:
    """Return what `suppress_each` does, of the same arguments; waits for the device a few times a block."""
    over = below(iou)
    low_x, low_y, high_x, high_y, confidence, label = candidates.unbind(2)
    area = (high_x - low_x) * (high_y - low_y)
    group = torch.zeros_like(label) if agnostic else label
    place = torch.arange(candidates.shape[1], device=candidates.device).expand_as(label)
    # NaN, which equals nothing, is the group of a column that holds no candidate.
    group = group.where(confidence > 0, math.nan)
    rest = _picked(torch.stack((low_x, low_y, high_x, high_y, area, group, place), dim=1), confidence > 0)
    found = candidates.new_zeros(len(candidates), limit + 1, 6)  # the last row takes what does not stay
    image = torch.arange(len(candidates), device=candidates.device)[:, None]
    count = torch.zeros_like(image)
    while rest.shape[2]:
        block, rest = rest[..., :DEVICE_BLOCK], rest[..., DEVICE_BLOCK:]
        stays = _stays(block, over)
        position = count + stays.cumsum(1) - 1
        stays &= position < limit
        rows = candidates.gather(1, block[:, _PLACE, :, None].long().expand(-1, -1, 6))
        found[image, position.where(stays, limit)] = rows
        count += stays.sum(1, keepdim=True)
        free = ~_beats(_picked(block, stays), rest, over).any(1)
        rest = _picked(rest, free & (count < limit))
    return [rows[:number] for rows, number in zip(found, count[:, 0].tolist(), strict=True)]


def _picked(table: Tensor, wanted: Tensor) -> Tensor:
    """Return the `wanted` [B,n] columns of [B,7,n], moved together; those that hold no candidate go in any case."""
    if not wanted.numel():
        return table
    wanted = wanted & ~table[:, _GROUP].isnan()
    count = wanted.sum(1, keepdim=True)
    width = int(count.max())
    place = (wanted.cumsum(1) - 1).where(wanted, width)
    column = torch.arange(wanted.shape[1], device=table.device)
    order = column.new_zeros(len(table), width + 1).scatter_(1, place, column.expand_as(place))[:, :width]
    picked = table.gather(2, order[:, None].expand(-1, table.shape[1], -1))
    picked[:, _GROUP].masked_fill_(column[:width] >= count, math.nan)
    return picked


def _beats(a: Tensor, b: Tensor, over: float) -> Tensor:
    """Return [B,k,n] whether columns of [B,7,k] and [B,7,n] are of one group and overlap by more than `over`."""
    one, two = a.unsqueeze(3).unbind(1), b.unsqueeze(2).unbind(1)
    inter = torch.minimum(one[2], two[2]).sub_(torch.maximum(one[0], two[0])).clamp_(min=0)
    height = torch.minimum(one[3], two[3]).sub_(torch.maximum(one[1], two[1]))
    inter.mul_(height)  # below 0 where the height is: not over anything
    union = torch.add(one[_AREA], two[_AREA], out=height).sub_(inter)
    return (inter.div_(union) > over).logical_and_(one[_GROUP] == two[_GROUP])


def _stays(block: Tensor, over: float) -> Tensor:
    """Return [B,n] which columns stay when each that stays takes those after it that it overlaps.

    All are settled again and again from what stood before, each time at least one more for good; a few times are
    enough, as chains of boxes that overlap are short.
    """
    beats = _beats(block, block, over).triu_(1).float()
    there = ~block[:, _GROUP].isnan()
    stays = there
    while True:
        before, stays = stays, there & (torch.bmm(stays[:, None].float(), beats)[:, 0] == 0)
        if torch.equal(before, stays):
            return stays
