"""Decode images from their files and resize them to the training size; notice files that have changed."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from functools import cached_property
from typing import Any

import cv2
import numpy as np

from starling.core.errors import DataError
from starling.data.cache.pixel_file import FORMAT
from starling.data.dataset.dataset import Dataset
from starling.data.dataset.images import decode_image, file_stamp

logger = logging.getLogger(__name__)

_SHOWN = 3
"""Number of changed images that are named; naming all would flood the log."""


class ImageChangedError(Exception):
    """An image file is no longer the one that the dataset's scan has read."""


class ResizedImages:
    """`images[i]` decodes image i: uint8 RGB [H,W,3], read-only, with the longest side `image_size`."""

    shapes_hw: np.ndarray[Any, Any]
    """[N,2] int64."""

    def __init__(self, dataset: Dataset, image_size: int) -> None:
        """Decode nothing yet. Images that change after the dataset's scan are logged when they are decoded."""
        self.dataset, self.image_size = dataset, image_size
        self.shapes_hw = _resized_shapes(dataset.shapes_hw, image_size)
        self._telling = threading.Lock()
        self._changed: set[int] = set()

    def __getitem__(self, index: int) -> np.ndarray[Any, Any]:
        image, changed = self._read(index)
        if changed:
            self._tell_changed(index)
        return image

    def unchanged(self, index: int) -> np.ndarray[Any, Any]:
        """Return an image; raises ImageChangedError if its file has changed since the dataset's scan."""
        image, changed = self._read(index)
        if changed:
            raise ImageChangedError(str(self.dataset.images[index]))
        return image

    @cached_property
    def key(self) -> str:
        """The hex SHA-256 that names the pixel file: of each image's name, shape and stamp, the image size, the format.

        Labels and the dataset's folder have no influence: a relabelled or moved dataset keeps its pixel file.
        """
        digest = hashlib.sha256(f"{FORMAT}\n{self.image_size}\n".encode())
        names = [os.fspath(path) for path in self.dataset.images]
        root = os.path.commonpath([os.path.dirname(name) for name in names])
        for name in names:
            digest.update(os.fsencode(name.removeprefix(root)) + b"\0")
        digest.update(np.ascontiguousarray(self.dataset.shapes_hw).tobytes())
        digest.update(np.ascontiguousarray(self.dataset.stamps).tobytes())
        return digest.hexdigest()

    def costs(self) -> list[int]:
        """Return the maximum bytes that decoding each image takes: twice the original, once the result."""
        result: list[int] = (6 * self.dataset.shapes_hw.prod(1) + 3 * self.shapes_hw.prod(1)).tolist()
        return result

    def _read(self, index: int) -> tuple[np.ndarray[Any, Any], bool]:
        """Return an image, and whether its file has changed since the dataset's scan."""
        path = self.dataset.images[index]
        image = decode_image(path)
        if image.shape[:2] != tuple(self.dataset.shapes_hw[index]):
            raise DataError(f"{path}: changed since the start; start again")
        try:
            changed = file_stamp(path.stat()) != tuple(self.dataset.stamps[index])
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; check the file") from None
        height, width = (int(side) for side in self.shapes_hw[index])
        if image.shape[:2] != (height, width):
            # Area averaging keeps small objects, which bilinear sampling at four points would skip.
            shrinks = height < image.shape[0]
            how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
            image = cv2.resize(image, (width, height), interpolation=how)
        return read_only(image), changed

    def _tell_changed(self, index: int) -> None:
        with self._telling:
            if index in self._changed:
                return
            self._changed.add(index)
            remedy = "training uses the new image with the old labels; start again to read both anew"
            if len(self._changed) <= _SHOWN:
                logger.warning(f"{self.dataset.images[index]}: changed since the start; {remedy}")
            elif len(self._changed) == _SHOWN + 1:
                logger.warning("more images changed since the start")


def read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a view of the array that does not allow writing."""
    view = array.view()
    view.flags.writeable = False
    return view


def _resized_shapes(shapes_hw: np.ndarray[Any, Any], image_size: int) -> np.ndarray[Any, Any]:
    """Return [N,2] int64 shapes scaled so that the longest side is `image_size`."""
    longest = shapes_hw.max(1, keepdims=True)
    return np.maximum(np.rint(shapes_hw * (image_size / longest)), 1).astype(np.int64)
