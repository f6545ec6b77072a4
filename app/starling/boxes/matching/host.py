"""Match on a CPU, compiled by Numba (see `starling.boxes.nms.host`): one detection at a time, without large arrays."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from starling.compiled import compiled

Floats = NDArray[np.float32]


def match(detections: Tensor, image: Tensor, labels: Tensor, limits: Tensor) -> Tensor:
    """Return [m,T] bool, see `match_images`; all tensors are on the host."""
    found, actual = (values.detach().float().contiguous().numpy() for values in (detections, labels))
    return torch.from_numpy(_match(found, image.numpy(), actual, limits.numpy()))


@compiled()
def _match(detections: Floats, image: NDArray[np.int64], labels: Floats, limits: Floats) -> NDArray[np.bool_]:
    correct = np.zeros((len(detections), len(limits)), np.bool_)
    taken = np.zeros((labels.shape[0], labels.shape[1], len(limits)), np.bool_)
    for row in range(len(detections)):
        left, top, right, bottom, _, predicted = detections[row]
        area = (right - left) * (bottom - top)
        theirs = labels[image[row]]
        most, claimed = np.float32(0), 0
        for index in range(len(theirs)):
            actual, low_x, low_y, high_x, high_y = theirs[index]
            if actual != predicted:
                continue
            width = max(min(right, high_x) - max(left, low_x), np.float32(0))
            height = max(min(bottom, high_y) - max(top, low_y), np.float32(0))
            shared = width * height
            overlap = shared / (area + (high_x - low_x) * (high_y - low_y) - shared + np.float32(1e-7))
            if overlap > most:
                most, claimed = overlap, index
        for column in range(len(limits)):
            if most >= limits[column] and not taken[image[row], claimed, column]:
                taken[image[row], claimed, column] = correct[row, column] = True
    return correct
