"""The folder of pixel files: who builds, who waits, what is left over, and what goes when space is short.

Only files of our own names are ever removed, and of these only such that no process maps. The locks are `flock`: they
hold between all processes and containers of a host, over NFS between hosts too where the mount passes locks on, and
end with their holder, so that a killed builder's place is taken at once.
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
from starling.core.sizes import format_gib
from starling.data.cache.pixel_file import SUFFIX, PixelFile, PixelLayout, open_regular, read_head

logger = logging.getLogger(__name__)

CACHE_FOLDER = ".cache"
"""Below the runs folder, so that every container of the host shares it."""
MARGIN = 1 << 30
"""Bytes of the disk that are left free, for checkpoints."""
POLL_S = 0.2
"""Seconds between two looks at a lock that another process holds."""
_NAME = re.compile(rf"[0-9a-f]{{64}}{re.escape(SUFFIX)}")
_LEFTOVER = re.compile(rf"\.([0-9a-f]{{64}}){re.escape(SUFFIX)}\..*{re.escape(TEMPORARY_SUFFIX)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptFile:
    """A file of the folder."""

    path: Path
    nbytes: int
    used_at: float
    """Seconds since 1970 when a process last opened it."""
    in_use: bool
    """Whether a process maps it."""
    pictures: int | None
    """None where the head is damaged or of another version, as is the next."""
    image_size: int | None


def shared_pixels(folder: Path, layout: PixelLayout, build: Callable[[Path], None]) -> PixelFile:
    """Return the mapped file of this layout, built first if no process of this host has.

    One process builds under a lock and renames a finished file into place; others wait, and say so. Raises OSError
    where the file cannot be kept, and what `build` raises.
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
    """Remove the damaged `file` at `path`, unless a new one has taken its place; who maps it keeps it."""
    with suppress(OSError):
        if file.is_at(path):
            remove(path)


def kept_files(folder: Path) -> list[KeptFile]:
    """Return the folder's files, the most recently used first; none where there is no folder."""
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
    """Remove the files that no process maps and what killed builders left; return the files removed."""
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

    The lock's file goes with the lock. A process that got hold of a file that has gone begins again.
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
    """Remove what killed builders left; `own_key` is the one whose lock the caller holds."""
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
                if try_flock(descriptor) and is_at(descriptor, lock):  # so nobody is at it
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
    """Return a descriptor of the lock's file; never through a link or of another's file, as it is written to."""
    return open_file(path, os.O_RDWR | os.O_CREAT, alone=True)
