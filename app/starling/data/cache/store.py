"""Images at training size: decoded once, kept as uint8 RGB in one file shared by a host, or in memory."""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np

from starling.core.cgroups import container_memory_limit, container_memory_used
from starling.core.errors import ConfigError
from starling.core.files.folder import LinkRefused
from starling.core.files.refusals import refusal
from starling.core.units import format_gib
from starling.data.augment.letterbox import Size
from starling.data.cache.pixel_file import SUFFIX, PixelFile, PixelLayout, write_pixels
from starling.data.cache.pixel_folder import (
    CACHE_FOLDER,
    KeptFile,
    discard,
    kept_files,
    remove_idle,
    shared_pixels,
)
from starling.data.cache.resized import ImageChangedError, ResizedImages, read_only
from starling.data.dataset.dataset import Dataset, Progress
from starling.outputs.run_dir import runs_root

logger = logging.getLogger(__name__)

StoreMode = Literal["auto", "ram", "disk", "device", "off"]
_WAYS: dict[StoreMode, tuple[StoreMode, ...]] = {
    "auto": ("disk", "ram"),
    "disk": ("disk", "ram"),
    "device": ("disk", "ram"),
    "ram": ("ram", "disk"),
    "off": (),
}
"""For each requested mode the ways of keeping images, tried in order; if none works, images are decoded each time."""


class ImageStore:
    """`store[i]` is image i of the dataset, uint8 RGB [H,W,3] with the longest side `image_size`.

    Arrays are read-only and may be used from any number of threads. Modes: `disk` maps one file that all processes and
    containers of the host share, so that its pages are in memory once; `ram` keeps decoded images in this process,
    decoding each at its first use; `off` decodes an image at each use; `device` is `disk` for a trainer that copies all
    images to its GPU; `auto` is `disk` if the file can be kept and fits into memory, else `ram`, and on the GPU too
    if the images fit there.
    A mode that does not work is replaced, `disk` and `ram` by each other and then by `off`, and `reason` says so.
    """

    mode: StoreMode
    """How images are kept in fact: `disk`, `ram` or `off`."""
    on_device: bool
    """Whether the trainer is to copy the images to its GPU: `device` or `auto` was requested, and the images fit."""
    reason: str
    """The reason for mode and place, for the log: one line with the remedy."""

    def __init__(
        self,
        dataset: Dataset,
        image_size: int,
        mode: StoreMode = "auto",
        memory_limit_bytes: int | None = None,
        *,
        cache_folder: Path | None = None,
        device_free_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Prepare the store; only `disk` reads images now, unless its file exists already.

        `memory_limit_bytes` bounds `ram`, by default half of what the container has left; `device_free_bytes` is
        what images may take of the GPU's memory, None without a GPU. `progress` is told of images decoded into
        the file.
        """
        if mode not in get_args(StoreMode):
            raise ConfigError("cache", mode, f"must be one of {', '.join(get_args(StoreMode))}")
        if image_size < 1:
            raise ConfigError("image_size", image_size, "must be at least 1")
        if mode in ("disk", "device") and cache_folder is None:
            raise ConfigError("cache", mode, "needs a cache folder")
        if memory_limit_bytes is None:
            memory_limit_bytes = max(container_memory_limit() - container_memory_used(), 0) // 2
        self.dataset = dataset
        self.image_size = image_size
        self._originals = ResizedImages(dataset, image_size)
        self.shapes_hw = self._originals.shapes_hw
        self._offsets = np.concatenate(([0], np.cumsum(self.shapes_hw.prod(1) * 3)))
        self.nbytes = int(self._offsets[-1])
        self._asked: StoreMode = mode
        self._budget, self._folder = memory_limit_bytes, cache_folder
        self._progress = progress
        self._locks = [threading.Lock() for _ in range(64)]
        self._telling = threading.Lock()
        self._damaged: list[PixelFile] = []
        self._file: PixelFile | None = None
        self._memory: np.ndarray[Any, Any] | None = None
        self._present = bytearray(len(dataset))
        self._settle()
        self._choose_device(device_free_bytes)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> np.ndarray[Any, Any]:
        file = self._file
        if file is not None:
            pixels = file.image(index)
            return self._shaped(index, pixels) if pixels is not None else self._instead(index, file)
        if self._memory is None:
            return self._originals[index]
        pixels = self._memory[self._offsets[index] : self._offsets[index + 1]]
        if not self._present[index]:
            with self._locks[index % len(self._locks)]:  # two threads never decode the same image
                if not self._present[index]:
                    pixels[:] = self._originals[index].reshape(-1)
                    self._present[index] = 1
        return self._shaped(index, pixels)

    def key(self) -> str:
        """Return the hex SHA-256 that names the pixel file."""
        return self._originals.key

    def _settle(self) -> None:
        """Keep images in the first way that works, and note why other ways do not work."""
        self._file = self._memory = None
        self.mode, refused = "off", []
        for way in _WAYS[self._asked]:
            problem = self._share() if way == "disk" else self._reserve()
            if problem is None:
                self.mode = way
                break
            refused.append(problem)
        kept = {
            "disk": f"{format_gib(self.nbytes)} in one file for all processes of this host, in {self._folder}",
            "ram": f"{format_gib(self.nbytes)} in this process's memory",
            "off": "decoded each time",
        }[self.mode]
        self.reason = "; ".join((kept, *filter(None, refused)))

    def _share(self) -> str | None:
        """Map the shared file, and build a missing one; return the problem; empty if no cache folder is given."""
        if self._folder is None:
            return ""
        memory = container_memory_limit()
        if self._asked in ("auto", "ram") and self.nbytes > memory:
            return (
                f"a shared file of {format_gib(self.nbytes)} would not stay in {format_gib(memory)} of memory; "
                "--cache disk keeps one all the same, for a fast disk"
            )
        layout = PixelLayout(self.key(), self.image_size, self._offsets)

        def build(path: Path) -> None:
            cv2.setNumThreads(1)  # as in the loader: threads work on different images
            write_pixels(path, layout, self._originals.unchanged, self._originals.costs(), self._progress)

        try:
            self._file = shared_pixels(self._folder, layout, build)
        except OSError as error:
            where, why = error.filename or self._folder, error.strerror or error
            if isinstance(error, LinkRefused):
                return f"no shared file: {refusal(error)}"
            return f"no shared file: {where}: {why}; make room there or make it writable"
        except ImageChangedError as error:
            return (
                f"no shared file: {error} changed while it was decoded; start again when the images are ready"
            )
        return None

    def _reserve(self) -> str | None:
        """Reserve memory for all images; pages are taken as images are decoded. Return the problem, or None."""
        if self.nbytes > self._budget:
            remedy = "--cache disk keeps them in a file" if self._asked == "ram" else "raise the memory limit"
            return f"{format_gib(self.nbytes)} of images do not fit the {format_gib(self._budget)} to spend; {remedy}"
        try:
            self._memory = np.empty(self.nbytes, np.uint8)
        except MemoryError:
            return f"{format_gib(self.nbytes)} of memory are refused; raise the memory limit"
        self._present = bytearray(len(self))
        return None

    def _choose_device(self, free: int | None) -> None:
        self.on_device = False
        if self._asked not in ("auto", "device") or self.mode == "off":
            return
        fits = free is not None and self.nbytes <= free
        if self._asked == "auto" and not fits:
            return
        if free is None:
            problem = "this process uses none"
        elif self.nbytes > free:
            problem = f"{format_gib(self.nbytes)} do not fit the {format_gib(free)} to spend there; lower --batch or --imgsz"
        else:
            self.on_device = True
            self.reason = f"on the GPU, from {self.reason}"
            return
        self.reason = f"not on a GPU: {problem}; {self.reason}"

    def _instead(self, index: int, file: PixelFile) -> np.ndarray[Any, Any]:
        """Return an image that is damaged in the file, decoded from its original."""
        self._forget(file)
        return self._originals[index]

    def _forget(self, file: PixelFile) -> None:
        """Remove a damaged file from the folder, so that the next start builds it again; print one line per file."""
        with self._telling:
            if file in self._damaged:
                return
            self._damaged.append(file)
            assert self._folder is not None
            path = self._folder / f"{self.key()}{SUFFIX}"
            discard(path, file)
            logger.warning(f"{path}: damaged, so removed; its damaged images are decoded anew")

    def _shaped(self, index: int, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return read_only(pixels.reshape(*self.shapes_hw[index], 3))


def stored_ratio(original_hw: Size, image_size: int) -> float:
    """Return the ratio of stored pixels to original pixels along a side."""
    return image_size / max(original_hw)


def show_cache(folder: Path | None, *, remove: bool, as_json: bool) -> None:
    """Print the content of `folder` (default: the runs folder's cache); with `remove`, first remove unused files."""
    folder = folder.absolute() if folder else runs_root() / CACHE_FOLDER
    removed = remove_idle(folder) if remove else []
    kept = kept_files(folder)
    if as_json:
        print(json.dumps({"folder": str(folder), "files": _plain(kept), "removed": _plain(removed)}))
        return
    for file in removed:
        print(f"removed  {_line(file)}")
    for file in kept:
        print(f"{'in use' if file.in_use else 'idle':<7}  {_line(file)}")
    print(f"{folder}: {len(kept)} files, {format_gib(sum(file.nbytes for file in kept))}")


def _plain(files: list[KeptFile]) -> list[dict[str, Any]]:
    return [{**asdict(file), "path": str(file.path)} for file in files]


def _line(file: KeptFile) -> str:
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.used_at))
    content = f"{file.pictures} images at {file.image_size} px" if file.pictures else "damaged or outdated"
    return f"{file.path.name[:12]}…  {format_gib(file.nbytes):>12}  used {used}  {content}"
