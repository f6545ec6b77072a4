"""Compiled suppression, image by image on a CPU's cores: about a sixth of the CPU time of NumPy or torchvision.

Numba compiles at the first call and stores the machine code beside this module's bytecode, or in the user's cache. If
neither can be written, each process compiles again, in about two seconds.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from starling.boxes.nms.rules import MAX_CANDIDATES, Rules, below
from starling.compiled import compiled

HEAD = 2048
"""The number of an image's candidates that are sorted first; the rest is sorted only if these are not enough."""
STRIDE = 16
"""The number of kept boxes that a candidate is compared with at once, in one vector register."""

Floats = NDArray[np.float32]
Keys = NDArray[np.int64]


def suppress(predictions: Tensor, rules: Rules) -> list[Tensor]:
    """Return the kept boxes of each image, [n,6] xyxy, confidence, class; `predictions` [B,anchors,5+nc] is float32."""
    images = predictions.detach().contiguous().numpy()
    wanted = np.array([rules.classes is None or c in rules.classes for c in range(images.shape[2] - 5)])
    one = partial(_suppress_image, wanted=wanted, rules=rules)
    # Sorting and compiled code release the GIL, so threads are enough.
    workers = min(torch.get_num_threads(), len(images), os.cpu_count() or 1)
    if workers < 2:
        return [torch.from_numpy(one(image)) for image in images]
    with ThreadPoolExecutor(workers) as pool:
        return [torch.from_numpy(found) for found in pool.map(one, images)]


def _suppress_image(rows: Floats, wanted: NDArray[np.bool_], rules: Rules) -> Floats:
    """Return the kept boxes of one image's predictions [anchors,5+nc]."""
    over, limit = np.float32(below(rules.iou)), rules.limit
    keys = _candidates(rows, np.float32(rules.conf), wanted, rules.multi_label)
    if len(keys) > HEAD:
        # The kept boxes among the first k candidates depend on these k only.
        keys.partition(HEAD - 1)
        found = _keep(rows, np.sort(keys[:HEAD]), over, limit, rules.agnostic)
        if len(found) == limit:
            return found
    keys.sort()
    return _keep(rows, keys[:MAX_CANDIDATES], over, limit, rules.agnostic)


@compiled()
def _candidates(rows: Floats, conf: np.float32, wanted: NDArray[np.bool_], multi_label: bool) -> Keys:
    """Return a key for each candidate; keys sort by falling confidence, then by rising place.

    A place is row x nc + class. Positive float32 values sort like their bits.
    """
    nc = rows.shape[1] - 5
    keys = np.empty(rows.shape[0] * (nc if multi_label else 1), np.int64)
    score = np.empty(1, np.float32)
    bits = score.view(np.int32)
    count = 0
    for row in range(rows.shape[0]):
        objectness = rows[row, 4]
        if not objectness > conf:
            continue
        if multi_label:
            for label in range(nc):
                score[0] = rows[row, 5 + label] * objectness
                if score[0] > conf and wanted[label]:
                    keys[count] = (-np.int64(bits[0]) << 32) | (row * nc + label)
                    count += 1
        else:
            best, score[0] = 0, 0
            for label in range(nc):
                if rows[row, 5 + label] * objectness > score[0]:
                    best, score[0] = label, rows[row, 5 + label] * objectness
            if score[0] > conf and wanted[best]:
                keys[count] = (-np.int64(bits[0]) << 32) | (row * nc + best)
                count += 1
    return keys[:count]


@compiled(error_model="numpy")
def _keep(rows: Floats, keys: Keys, over: np.float32, limit: int, agnostic: bool) -> Floats:
    """Return [n,6] xyxy, confidence, class of the sorted candidates that no kept box of their group overlaps."""
    nc = rows.shape[1] - 5
    groups = 1 if agnostic else nc
    kept = np.empty((groups, 5, limit), np.float32)  # corners and area, per group
    counts = np.zeros(groups, np.int64)
    bits = np.empty(1, np.int32)
    score = bits.view(np.float32)
    found = np.empty((limit, 6), np.float32)
    total = 0
    for key in keys:
        if total == limit:
            break
        place = key & 0xFFFFFFFF
        row = place // nc
        label = place - row * nc
        group = 0 if agnostic else label
        half_width, half_height = rows[row, 2] / np.float32(2), rows[row, 3] / np.float32(2)
        left, right = rows[row, 0] - half_width, rows[row, 0] + half_width
        top, bottom = rows[row, 1] - half_height, rows[row, 1] + half_height
        area = (right - left) * (bottom - top)
        lefts, tops, rights, bottoms, areas = kept[group]
        count = counts[group]
        overlaps = 0
        begin = 0
        while overlaps == 0 and begin < count:
            end = min(begin + STRIDE, count)
            for other in range(begin, end):  # without a break, which lets the compiler vectorise
                low_x = left if left > lefts[other] else lefts[other]
                low_y = top if top > tops[other] else tops[other]
                high_x = right if right < rights[other] else rights[other]
                high_y = bottom if bottom < bottoms[other] else bottoms[other]
                width = high_x - low_x if high_x > low_x else np.float32(0)
                shared = width * (high_y - low_y)  # negative for a negative height: never above `over`
                # Two boxes without area: 0 / 0 is NaN, which is never above `over`.
                overlaps += shared / (area + areas[other] - shared) > over
            begin = end
        if overlaps == 0:
            lefts[count], tops[count], rights[count], bottoms[count] = left, top, right, bottom
            areas[count] = area
            counts[group] = count + 1
            bits[0] = -(key >> 32)
            found[total, 0], found[total, 1], found[total, 2], found[total, 3] = left, top, right, bottom
            found[total, 4], found[total, 5] = score[0], label
            total += 1
    return found[:total]
