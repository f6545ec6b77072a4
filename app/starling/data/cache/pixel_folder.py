"""The folder of pixel files: which process builds, which wait, cleaning up, and what is removed if space is short.

Only files with names of this format are ever removed, and only if no process maps them. The locks are `flock`: they
hold between all processes and containers of a host, over NFS between hosts too if the mount passes locks on. A lock
ends with its holder, so that another process takes over from a killed builder at once.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from starling.core.files.atomic import TEMPORARY_SUFFIX
from starling.core.files.refusals import disk_write
from starling.core.files.safe_open import make_folder, names_in, open_file, remove, state_of
from starling.core.lock import is_at, take, try_flock, wait_for
from starling.core.units import format_gib
from starling.data.cache.pixel_file import SUFFIX, PixelFile, PixelLayout, open_regular, read_head

logger = logging.getLogger(__name__)

CACHE_FOLDER = ".cache"
"""Folder below the runs folder, so that every container of the host shares it."""
MARGIN = 1 << 30
"""Bytes of the disk that stay free for checkpoints."""
POLL_S = 0.2
"""Seconds between two attempts to take a lock that another process holds."""
_NAME = re.compile(rf"[0-9a-f]{{64}}{re.escape(SUFFIX)}")
_LEFTOVER = re.compile(rf"\.([0-9a-f]{{64}}){re.escape(SUFFIX)}\..*{re.escape(TEMPORARY_SUFFIX)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptFile:
    """A pixel file in the folder."""

    path: Path
    nbytes: int
    used_at: float
    """Seconds since 1970 when a process last opened it."""
    in_use: bool
    """Whether any process maps the file."""
    pictures: int | None
    """Number of images; None, like `image_size`, if the head is damaged or of another version."""
    image_size: int | None


def shared_pixels(folder: Path, layout: PixelLayout, build: Callable[[Path], None]) -> PixelFile:
    """Return the mapped file of this layout, built first if no process of this host has.

    One process builds under a lock and renames the finished file into place; other processes wait, and print a line.
    Raises OSError if the file cannot be kept, and the exceptions of `build`.
    """
    path = folder / f"{layout.key}{SUFFIX}"
    found = PixelFile.open(path, layout)
    if found is None:
        make_folder(folder)
        with _only_builder(path):
            found = PixelFile.open(path, layout)
            if found is None:
                if state_of(path) is not None:
                    logger.warning(f"{path}: cut off or damaged; it is built anew")
                _sweep(folder, layout.key)
                _make_room(folder, layout)
                build(path)
                found = PixelFile.open(path, layout)
    if found is None:
        raise OSError(errno.EIO, "what was written does not read the same", str(path))
    return found


def discard(path: Path, file: PixelFile) -> None:
    """Remove the damaged `file` at `path`, unless a new file has replaced it; processes that map it keep it."""
    with suppress(OSError):
        if file.is_at(path):
            remove(path)


def kept_files(folder: Path) -> list[KeptFile]:
    """Return the folder's files, most recently used first; an empty list without a folder."""
    found = []
    for path in _own_files(folder):
        with suppress(OSError), open_regular(path) as file:
            status, head = os.fstat(file.fileno()), read_head(file) or {}
            kept = KeptFile(
                path=path,
                nbytes=status.st_size,
                used_at=status.st_mtime,
                in_use=not try_flock(file.fileno()),
                pictures=head.get("pictures"),
                image_size=head.get("image_size"),
            )
            found.append(kept)
    return sorted(found, key=lambda kept: -kept.used_at)


def remove_idle(folder: Path) -> list[KeptFile]:
    """Remove pixel files that no process maps, and temporary files of killed builders; return the former."""
    removed = []
    for kept in kept_files(folder):
        with suppress(OSError), open_regular(kept.path) as file:
            if try_flock(file.fileno()):
                remove(kept.path)
                removed.append(kept)
    _sweep(folder)
    return removed


@contextmanager
def _only_builder(path: Path) -> Iterator[None]:
    """Hold the right to build `path`; wait for whoever has it, and say so once.

    The lock file is removed with the lock. A process that has locked a removed file begins again.
    """
    lock = path.with_suffix(".lock")
    told: list[str] = []

    def acquire(descriptor: int) -> bool:
        def tell() -> None:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            if not told:
                told.append(holder)
                logger.info(f"waiting for {holder or 'another process'}, which builds the image cache {path}")

        return wait_for(lambda: try_flock(descriptor), tell=tell, poll_s=POLL_S)

    descriptor, _ = take(lock, lambda: _open_lock(lock), acquire)
    try:
        with disk_write(lock):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        try:
            yield
        finally:
            with suppress(OSError):
                remove(lock)
    finally:
        os.close(descriptor)


def _sweep(folder: Path, own_key: str | None = None) -> None:
    """Remove the temporary files of killed builders; `own_key` is the key whose lock the caller holds."""
    for name in names_in(folder):
        named, path = _LEFTOVER.fullmatch(name), folder / name
        if named is None:
            continue
        with suppress(OSError):
            if named[1] == own_key:
                remove(path)
                continue
            lock = folder / f"{named[1]}.lock"
            descriptor = _open_lock(lock)
            try:
                if try_flock(descriptor) and is_at(descriptor, lock):  # so no process builds this file
                    remove(path)
                    remove(lock)
            finally:
                os.close(descriptor)


def _make_room(folder: Path, layout: PixelLayout) -> None:
    """Remove files that no process maps, least recently used first, until `layout` fits; none where that is too little."""
    short = layout.start + layout.nbytes + MARGIN - (free := shutil.disk_usage(folder).free)
    if short <= 0:
        return
    with ExitStack() as locks:
        idle: list[tuple[float, Path, int]] = []
        for path in _own_files(folder):
            with suppress(OSError):
                file = locks.enter_context(open_regular(path))
                status = os.fstat(file.fileno())
                if try_flock(file.fileno()):
                    idle.append((status.st_mtime, path, status.st_size))
        if sum(size for _, _, size in idle) < short:
            raise OSError(
                errno.ENOSPC,
                f"{format_gib(layout.nbytes + MARGIN)} are needed with some to spare, {format_gib(free)} are free",
                str(folder),
            )
        for _, path, size in sorted(idle):
            if short <= 0:
                return
            remove(path)
            short -= size
            logger.info(
                f"{path}: removed for space, the least recently used image cache ({format_gib(size)})"
            )


def _own_files(folder: Path) -> list[Path]:
    return [folder / name for name in names_in(folder) if _NAME.fullmatch(name)]


def _open_lock(path: Path) -> int:
    """Return a descriptor of the lock file for writing; a link, or another user's file, is refused."""
    return open_file(path, os.O_RDWR | os.O_CREAT, alone=True)
