"""Pictures at training size: decoded once, kept as uint8 RGB in memory or in one file shared by a host."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import cv2
import numpy as np

from app.data.dataset import Dataset, Progress
from app.data.images import decode_image
from app.data.letterbox import Size
from app.data.limits import container_cpu_count, container_memory_limit, container_memory_used
from app.errors import ConfigError, DataError
from app.outputs.atomic import TEMPORARY_SUFFIX, write_atomic

StoreMode = Literal["auto", "ram", "disk", "off"]
_MODES = ("auto", "ram", "disk", "off")
_FORMAT = "starling-pixels-2"
"""Changes whenever the stored bytes of the same pictures would."""
_MAGIC = 64
"""Bytes of the file's head: the hex key, which is its content's name."""


class ImageStore:
    """`store[i]` is picture i of the dataset, uint8 RGB [H,W,3] with its longest side at `image_size`.

    Arrays are read-only and may be used from any number of threads. Modes: `ram` keeps decoded pictures in
    this process, filled as they are asked for; `disk` maps one file that all processes and containers of
    the host share, so that its pages are in memory once; `off` decodes each time; `auto` is `ram` when the
    whole set fits the budget, else `off`. `ram` over the budget becomes `off` too, and `reason` says so.
    """

    mode: StoreMode
    """The mode in use, never `auto`."""
    reason: str
    """Why, for the log."""

    def __init__(
        self,
        dataset: Dataset,
        image_size: int,
        mode: StoreMode = "auto",
        memory_limit_bytes: int | None = None,
        *,
        cache_folder: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Prepare the store; only `disk` reads pictures now, unless its file is there already.

        `memory_limit_bytes` bounds `ram`; by default half of what the container has left.
        """
        if mode not in _MODES:
            raise ConfigError("cache", mode, f"must be one of {', '.join(_MODES)}")
        if image_size < 1:
            raise ConfigError("image_size", image_size, "must be at least 1")
        if mode == "disk" and cache_folder is None:
            raise ConfigError("cache", mode, "needs a cache folder")
        self.dataset = dataset
        self.image_size = image_size
        self.shapes_hw = _stored_shapes(dataset.shapes_hw, image_size)
        self._offsets = np.concatenate(([0], np.cumsum(self.shapes_hw.prod(1) * 3)))
        self.nbytes = int(self._offsets[-1])
        self.mode, self.reason = self._choose(mode, memory_limit_bytes)
        self._kept: list[np.ndarray[Any, Any] | None] = [None] * len(dataset)
        self._locks = [threading.Lock() for _ in range(64)]
        self._mapped: np.ndarray[Any, Any] | None = None
        if self.mode == "disk":
            assert cache_folder is not None
            self._mapped = self._map(cache_folder, progress)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> np.ndarray[Any, Any]:
        if self._mapped is not None:
            start, end = self._offsets[index], self._offsets[index + 1]
            return self._mapped[start:end].reshape(*self.shapes_hw[index], 3)
        if self.mode == "off":
            return self._decode(index)
        image = self._kept[index]
        if image is None:
            with self._locks[index % len(self._locks)]:  # two threads never decode the same picture
                image = self._kept[index]
                if image is None:
                    image = self._kept[index] = self._decode(index)
        return image

    def key(self) -> str:
        """Return the hex SHA-256 that names the stored pixels: dataset, file stamps, size, format."""
        digest = hashlib.sha256(f"{_FORMAT}\n{self.dataset.digest}\n{self.image_size}\n".encode())
        digest.update(np.ascontiguousarray(self.dataset.stamps).tobytes())
        return digest.hexdigest()

    def _choose(self, mode: StoreMode, budget: int | None) -> tuple[StoreMode, str]:
        if mode in ("disk", "off"):
            return mode, "asked for"
        if budget is None:
            budget = max(container_memory_limit() - container_memory_used(), 0) // 2
        size = f"{self.nbytes / 2**30:.2f} GiB of pictures, {budget / 2**30:.2f} GiB to spend"
        return ("ram", size) if self.nbytes <= budget else ("off", f"{size}; try the disk cache")

    def _decode(self, index: int) -> np.ndarray[Any, Any]:
        image = decode_image(self.dataset.images[index])
        if image.shape[:2] != tuple(self.dataset.shapes_hw[index]):
            raise DataError(f"{self.dataset.images[index]}: changed since the start; start again")
        height, width = (int(side) for side in self.shapes_hw[index])
        if image.shape[:2] != (height, width):
            # Area averaging keeps small objects that sampling at four points would skip.
            shrinks = height < image.shape[0]
            how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
            image = cv2.resize(image, (width, height), interpolation=how)
        image.flags.writeable = False
        return image

    def _map(self, folder: Path, progress: Progress | None) -> np.ndarray[Any, Any]:
        """Return the mapped pixels, building the file first if no process of this host has.

        One process builds under a lock and renames a finished file into place, so a kill leaves at most a
        temporary file, which the next builder removes.
        """
        path = folder / f"{self.key()}.pixels"
        try:
            if not self._is_whole(path):
                folder.mkdir(parents=True, exist_ok=True)
                with _locked(folder / f"{self.key()}.lock"):
                    if not self._is_whole(path):
                        self._build(path, progress)
            return np.memmap(path, np.uint8, "r", offset=_MAGIC)
        except OSError as error:
            raise DataError(
                f"{path}: the cache cannot be kept: {error.strerror or error}; free space or use --cache ram"
            ) from None

    def _is_whole(self, path: Path) -> bool:
        try:
            with open(path, "rb") as file:
                return (
                    os.fstat(file.fileno()).st_size == _MAGIC + self.nbytes
                    and file.read(_MAGIC) == self.key().encode()
                )
        except FileNotFoundError:
            return False

    def _build(self, path: Path, progress: Progress | None) -> None:
        for leftover in path.parent.glob(f".{path.name}.*{TEMPORARY_SUFFIX}"):
            leftover.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < self.nbytes + (64 << 20):
            raise DataError(
                f"{path.parent}: the cache needs {self.nbytes / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; "
                "free space or use --cache off"
            )

        def write(file: IO[bytes]) -> None:
            file.write(self.key().encode())
            for done, image in enumerate(self._decode_all(), start=1):
                file.write(np.ascontiguousarray(image).data)
                if progress is not None:
                    progress(done, len(self))

        write_atomic(path, write)

    def _decode_all(self) -> Iterator[np.ndarray[Any, Any]]:
        """Yield every picture in order, decoded in threads, a bounded number ahead."""
        workers = container_cpu_count()
        waiting: deque[Future[np.ndarray[Any, Any]]] = deque()
        pool = ThreadPoolExecutor(workers, "decode")
        try:
            for index in range(len(self)):
                waiting.append(pool.submit(self._decode, index))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _stored_shapes(shapes_hw: np.ndarray[Any, Any], image_size: int) -> np.ndarray[Any, Any]:
    """Return [N,2] int64 shapes scaled so that the longest side is `image_size`."""
    longest = shapes_hw.max(1, keepdims=True)
    return np.maximum(np.rint(shapes_hw * (image_size / longest)), 1).astype(np.int64)


def stored_ratio(original_hw: Size, image_size: int) -> float:
    """Return stored pixels per original pixel."""
    return image_size / max(original_hw)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock; the kernel releases it with the process."""
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
