"""Copy a run's results to object storage at its end. A failure does not fail the run, but is reported in one line."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from starling.core.errors import UsageError
from starling.core.settings.values import BUCKET_DRIVERS, check_bucket

logger = logging.getLogger(__name__)

_TEMPORARY = (".part", ".lock", ".tmp")


def check_driver(url: str) -> None:
    """Raise UsageError if the package for the bucket's scheme is not installed; an empty `url` needs none."""
    package = BUCKET_DRIVERS[check_bucket(url)] if url else None
    if package is not None and importlib.util.find_spec(package) is None:
        raise UsageError(f"--bucket {url}: needs a package that is not installed: pip install {package}")


def result_files(folder: Path) -> Iterator[Path]:
    """Yield the result files of a run: files in its folder and `weights/*.pt`, without locks and temporary files."""
    for path in sorted([*folder.glob("*"), *folder.glob("weights/*.pt")]):
        hidden = path.name.startswith(".") or path.name.endswith(_TEMPORARY)
        if path.is_file() and not path.is_symlink() and not hidden:
            yield path


def upload(folder: Path, url: str) -> bool:
    """Copy the results in `folder` below `url`, replacing older ones; return whether all went well.

    Says one line on success and on failure, and raises only KeyboardInterrupt and SystemExit.
    """
    copied = 0
    try:
        import fsspec  # slow to import, and most runs do not need it

        filesystem, root = fsspec.core.url_to_fs(url)
        for path in result_files(folder):
            target = f"{root.rstrip('/')}/{path.relative_to(folder).as_posix()}"
            filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            if url.startswith("file://"):
                _copy(path, Path(target))
            else:  # an object appears only when it is complete
                filesystem.put_file(str(path), target)
            copied += 1
    except Exception as error:  # a driver may raise any exception; the run is done and its files are local
        reason = (str(error).splitlines() or [""])[0][:300]
        logger.warning(
            f"--bucket {url}: {copied} files copied, then {type(error).__name__}: {reason}; the results are in {folder}"
        )
        return False
    logger.info(f"--bucket: {copied} files copied to {url}")
    return True


def _copy(path: Path, target: Path) -> None:
    """Replace `target` with a copy atomically, because readers of a shared folder would see a growing file.

    The temporary name is always the same: the next copy replaces a killed copy's leftover.
    """
    temporary = target.with_name(f".{target.name}.part")
    try:
        with open(path, "rb") as source, open(temporary, "wb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
