"""Choose the batch size that fills a GPU's memory, for `--batch -1`."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from starling.device import Compute
from starling.model.detector import Detector

logger = logging.getLogger(__name__)

PROFILED = (1, 2, 4, 8, 16)
SHARE = 0.8
"""Share of the free memory that a batch may fill."""
FALLBACK = 16


def fit_batch(sizes: Sequence[int], used_bytes: Sequence[int], free_bytes: int) -> int:
    """Return the batch size that fills `SHARE` of the free memory, by a line through the measured sizes; at least 1.

    Returns `FALLBACK` if fewer than two sizes could be measured, or if the memory does not grow with the size.
    """
    if len(sizes) < 2:
        return FALLBACK
    slope, start = np.polyfit(sizes, used_bytes, deg=1)
    if slope < 1:  # less than a byte per image: the measurement failed
        return FALLBACK
    return max(int((free_bytes * SHARE - start) / slope), 1)


def choose_batch(detector: Detector, image_size: int, compute: Compute) -> int:
    """Measure forward and backward at a few sizes and return the batch to train with; on the CPU, 16."""
    if compute.on_cpu:
        logger.info(f"--batch -1: nothing to measure on the CPU, the batch is {FALLBACK}")
        return FALLBACK
    device = compute.device
    model = detector.to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    free_bytes, _ = torch.cuda.mem_get_info(device)
    sizes: list[int] = []
    used: list[int] = []
    for size in PROFILED:
        try:
            used.append(_measure(model, size, image_size, compute))
            sizes.append(size)
        except torch.OutOfMemoryError:
            break
        finally:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
    batch = fit_batch(sizes, used, free_bytes)
    logger.info(
        f"--batch -1: {batch} images fill {SHARE:.0%} of {free_bytes / 2**30:.1f} GiB free on this GPU"
    )
    return batch


def _measure(model: Detector, size: int, image_size: int, compute: Compute) -> int:
    """Return the peak bytes of one iteration."""
    torch.cuda.reset_peak_memory_stats(compute.device)
    images = torch.zeros(size, 3, image_size, image_size, device=compute.device)
    with compute.autocast():
        raw = model(images.to(memory_format=torch.channels_last))
    sum(level.float().mean() for level in raw).backward()
    return torch.cuda.max_memory_allocated(compute.device)
