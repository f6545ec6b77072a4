"""Anchors for a dataset, fitted once for each set of anchors that a training starts with."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from starling.data.dataset.dataset import Dataset
from starling.model.autoanchor import AutoAnchor, fit_anchors
from starling.model.detector import Detector
from starling.model.head import Detect

logger = logging.getLogger(__name__)


class AnchorFitter:
    """Fit anchors to the label sizes at the training's image size; a worker keeps one fitter for all its candidates."""

    def __init__(self, split: Dataset, *, image_size: int, anchor_t: float, seed: int) -> None:
        self._split, self._image_size = split, image_size
        # One threshold for a whole search: candidates that differ in anchor_t still share their anchors.
        self._anchor_t, self._seed = anchor_t, seed
        self._decided: dict[tuple[bytes, tuple[int, ...], bool], AutoAnchor] = {}

    def fit(self, detector: Detector, *, provisional: bool) -> None:
        """Give the detector anchors that fit, if its own do not fit or are `provisional`, and log what was done.

        A detector without anchors stays as it is.
        """
        head = detector.head
        if not isinstance(head, Detect):
            return
        current = head.anchors_px.cpu().numpy()
        key = (current.tobytes(), current.shape, provisional)
        if key not in self._decided:
            self._decided[key] = fit_anchors(
                label_sizes(self._split, self._image_size), current,
                anchor_t=self._anchor_t, seed=self._seed, provisional=provisional,
            )  # fmt: skip
            logger.info(self._decided[key].report)
        decision = self._decided[key]
        if decision.changed:
            head.set_anchors(torch.from_numpy(decision.anchors_px))


def label_sizes(split: Dataset, image_size: int) -> np.ndarray[Any, Any]:
    """Return [n,2] float32: width and height in pixels of every label, at a long image side of `image_size` pixels."""
    shapes_wh = split.shapes_hw[:, ::-1].astype(np.float32)
    scaled_wh = shapes_wh * (image_size / shapes_wh.max(axis=1, keepdims=True))
    sizes = [rows[:, 3:5] * wh for rows, wh in zip(split.labels, scaled_wh, strict=True)]
    return np.concatenate([np.zeros((0, 2), np.float32), *sizes]).astype(np.float32)
