"""One file of decoded images, mapped by all processes that use it: its format, how to write it, how to find damage.

The head, one page, is a line of JSON that describes the content. A table with one CRC-32 per image follows, and from
the next page on the pixels, image after image. Opening checks the length, the head and the digest of the CRCs, which
takes almost no time. The bytes of an image are checked at its first use, at about 7 GB/s per thread, a thirtieth of
the time of decoding. So a flipped byte is found before training uses it, and no start waits for a whole file.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from starling.core.cgroups import container_cpu_count, container_memory_limit, container_memory_used
from starling.core.files.atomic import write_atomic
from starling.core.files.safe_open import open_file, state_of
from starling.core.lock import try_flock, wait_for
from starling.core.plain_json import parse_json
from starling.data.dataset.dataset import Progress

FORMAT = "starling-pixels-3"
"""Changes whenever the stored bytes of the same images change."""
SUFFIX = ".pixels"
_PAGE = 4096

Image = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, eq=False)
class PixelLayout:
    """The intended content of a file; files with equal keys hold equal bytes."""

    key: str
    """Hex SHA-256, the file's name without suffix."""
    image_size: int
    offsets: np.ndarray[Any, Any]
    """[N+1] int64: the first byte of each image among the pixels, and the end of the last image."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return int(self.offsets[-1])

    @property
    def start(self) -> int:
        """Position of the pixels in the file, a multiple of the page size."""
        return _PAGE + -(-4 * len(self) // _PAGE) * _PAGE

    def head(self, checksums: bytes) -> bytes:
        """Return the file's first page, for a table of CRCs."""
        words = {
            "format": FORMAT,
            "key": self.key,
            "image_size": self.image_size,
            "pictures": len(self),
            "nbytes": self.nbytes,
            "checksums": hashlib.sha256(checksums).hexdigest(),
        }
        return json.dumps(words).encode().ljust(_PAGE - 1) + b"\n"


def open_regular(path: Path) -> IO[bytes]:
    """Open a regular file for reading, never through a link; raises OSError for anything else of that name."""
    return open(open_file(path, os.O_RDONLY), "rb")


def read_head(file: IO[bytes]) -> dict[str, Any] | None:
    """Return the content of an open file's head, of any layout; None if the file has no head of this format."""
    try:
        words = parse_json(file.read(_PAGE))
    except (ValueError, RecursionError):
        return None
    return words if isinstance(words, dict) and words.get("format") == FORMAT else None


class PixelFile:
    """A mapped file. A shared `flock`, which ends with the last map of the file, marks the file as in use."""

    pixels: np.ndarray[Any, Any]
    """[nbytes] uint8, read-only."""

    def __init__(self, file: IO[bytes], layout: PixelLayout, checksums: bytes) -> None:
        """Map an open file; use `open`."""
        # The map keeps a duplicate of the descriptor, and the duplicate keeps the lock.
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.pixels = np.frombuffer(self._map, np.uint8, layout.nbytes, layout.start)
        self._status = os.fstat(file.fileno())
        self._layout = layout
        self._checksums = np.frombuffer(checksums, "<u4")
        self._checked = bytearray(len(layout))

    @classmethod
    def open(cls, path: Path, layout: PixelLayout) -> Self | None:
        """Return the file at `path`; None if it is missing, truncated, damaged in its head, or has other content."""
        try:
            file = open_regular(path)
        except FileNotFoundError:
            return None
        with file:
            with suppress(OSError):  # a volume without locks: other processes cannot remove the file either
                wait_for(lambda: try_flock(file.fileno(), shared=True))
            status = os.fstat(file.fileno())
            if status.st_nlink == 0 or status.st_size != layout.start + layout.nbytes:
                return None
            head, checksums = file.read(_PAGE), file.read(4 * len(layout))
            if head != layout.head(checksums):
                return None
            with suppress(OSError):  # the file may belong to another user
                os.utime(file.fileno())  # the time of last use decides which file is removed first
            return cls(file, layout, checksums)

    def is_at(self, path: Path) -> bool:
        """Return whether this file, not a replacement, still has the name `path`."""
        there = state_of(path)
        return there is not None and os.path.samestat(self._status, there)

    def image(self, index: int) -> Image | None:
        """Return the bytes of an image [n]; None if they differ from the written bytes."""
        pixels = self.pixels[self._layout.offsets[index] : self._layout.offsets[index + 1]]
        if not self._checked[index]:
            if zlib.crc32(pixels.data) != self._checksums[index]:
                return None
            self._checked[index] = 1
        return pixels


def write_pixels(
    path: Path,
    layout: PixelLayout,
    decode: Callable[[int], Image],
    costs: Sequence[int],
    progress: Progress | None,
) -> None:
    """Decode all images in threads into a file that appears at `path` only when it is complete.

    `costs` are the bytes of memory that decoding each image takes. Raises OSError, or the exception of `decode`.
    """
    checksums = np.zeros(len(layout), "<u4")

    def write(file: IO[bytes]) -> None:
        def keep(index: int) -> None:
            pixels = np.ascontiguousarray(decode(index)).reshape(-1)
            checksums[index] = zlib.crc32(pixels.data)
            _write_at(file.fileno(), pixels, layout.start + int(layout.offsets[index]))

        for done, _ in enumerate(in_threads(keep, costs), start=1):
            if progress is not None:
                progress(done, len(layout))
        table = checksums.tobytes()
        file.write(layout.head(table) + table)

    write_atomic(path, write)


def in_threads(work: Callable[[int], None], costs: Sequence[int]) -> Iterator[None]:
    """Call `work(0)`, `work(1)`, …, one for each of `costs`, in threads, and yield in order as each call ends.

    Calls in progress cost together at most a quarter of the container's free memory; a single call may cost more.
    """
    threads = container_cpu_count()
    room = max(container_memory_limit() - container_memory_used(), 0) // 4
    waiting: deque[tuple[Future[None], int]] = deque()
    taken = 0
    pool = ThreadPoolExecutor(threads, "decode")
    try:
        for index, cost in enumerate(costs):
            while waiting and (len(waiting) > 4 * threads or taken + cost > room):
                future, freed = waiting.popleft()
                yield future.result()
                taken -= freed
            waiting.append((pool.submit(work, index), cost))
            taken += cost
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        pool.shutdown(cancel_futures=True)


def _write_at(descriptor: int, content: Image, position: int) -> None:
    rest = content.data
    while rest:
        written = os.pwrite(descriptor, rest, position)
        rest, position = rest[written:], position + written
