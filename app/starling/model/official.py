"""The published weights of the YOLOv5 project, by name: fetched once, kept in a folder of the user."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from starling.core.budget import BudgetExceeded
from starling.core.errors import CheckpointError
from starling.core.files.refusals import refusal
from starling.core.files.regular import read_regular
from starling.core.paths import at_home
from starling.core.plain_json import parse_json
from starling.data.fetch.download import (
    MIRROR,
    Download,
    FetchError,
    Show,
    fetch,
    mirrored,
    read_text,
    record_path,
    sha256_of,
)
from starling.model.families import family_of_name

logger = logging.getLogger(__name__)

OFFICIAL = tuple(f"yolov5{size}{levels}.pt" for levels in ("", "6") for size in "nsmlx")
"""Detection weights trained on COCO: P5 at 640 pixels, P6 at 1280."""

RELEASE = "https://github.com/ultralytics/yolov5/releases/download/v7.0"
RELEASE_FACTS = "https://api.github.com/repos/ultralytics/yolov5/releases/tags/v7.0"
"""GitHub's list of the release's files, with sizes and, if GitHub has them, digests."""

MAX_BYTES = 1 << 30
"""Maximum size; the largest published file has about 270 MB."""


def official_name(name: str) -> str | None:
    """Return the published file with this bare name, with or without `.pt`; None for any other name."""
    full = name if name.endswith(".pt") else f"{name}.pt"
    return full if full in OFFICIAL else None


def another_family(name: str) -> str | None:
    """Return a message for a name of weights of another family, with a suitable YOLOv5 file; None for other names."""
    family = family_of_name(name)
    if family is None:
        return None
    if family == "YOLOv5u":
        layout = f"{Path(name).name.removesuffix('.pt')}.yaml"
        return f"weights of YOLOv5u are read, but not fetched: train from scratch with --weights '' --cfg {layout}"
    size = re.search(r"(?:[\d_x]|detr|sam)-?([nsmlx])(6?)u?(?![a-z0-9])", name.lower())
    small = "tiny" in name.lower()
    instead = "yolov5n.pt" if small else f"yolov5{size[1]}{size[2]}.pt" if size else "yolov5s.pt"
    return (
        f"by its name weights of {family}; this program reads its own checkpoints and those of YOLOv5 detectors only: "
        f"give {instead}, which is fetched"
    )


def weights_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of fetched weights: `$STARLING_WEIGHTS`, else `starling/weights` in the user's cache."""
    if given := environment.get("STARLING_WEIGHTS"):
        return at_home(given).absolute()
    cache = environment.get("XDG_CACHE_HOME") or at_home("~/.cache")
    return Path(cache) / "starling" / "weights"


def official_weights(name: str, show: Show = lambda line: None) -> Path:
    """Return the path of published weights, fetching them unless they are kept already.

    A kept file is compared with the digest recorded at its download. Raises CheckpointError, with what to fetch by hand
    and where to put it, if the weights cannot be fetched.
    """
    path = weights_folder() / name
    if path.is_file():
        return _verified(path)
    url = mirrored(f"{RELEASE}/{name}")
    try:
        sha256, size = _published(name, url)
        logger.info(f"fetching {url} to {path}")
        if sha256 is None:
            logger.warning(f"{name}: no checksum is published; its size is checked, its digest recorded")
        wanted = Download(url=url, target=path, max_bytes=MAX_BYTES, sha256=sha256, size=size)
        digest = fetch(wanted, show=show)
    except FetchError as error:
        raise CheckpointError(
            f"--weights {name}: not here, and it cannot be fetched: {error}. Download {RELEASE}/{name} on a machine "
            f"that can, and put it into {path.parent} or into this folder ({Path.cwd()})"
        ) from None
    except OSError as error:
        raise refusal(error, path) or CheckpointError(
            f"--weights {name}: {path.parent} cannot be written ({error.strerror}); set STARLING_WEIGHTS to a folder "
            "that can, or give the path of a .pt file"
        ) from None
    logger.info(f"{name}: {path.stat().st_size / 1e6:.1f} MB, SHA-256 {digest}")
    return path


def _verified(path: Path) -> Path:
    """Return `path` if its digest equals the digest recorded beside it; raises CheckpointError otherwise."""
    try:
        recorded = read_regular(record_path(path), 4096).decode("ascii", "replace").split()[:1]
    except (OSError, BudgetExceeded):
        return path  # put there by the user
    if recorded and recorded[0] != sha256_of(path):
        raise CheckpointError(
            f"{path}: its content changed since it was fetched; delete it and fetch it again, or delete "
            f"{record_path(path).name} if the change is yours"
        )
    return path


def _published(name: str, url: str) -> tuple[str | None, int | None]:
    """Return the published SHA-256 and size of a file, None for values that are not published."""
    if os.environ.get(MIRROR):
        return _sidecar(f"{url}.sha256"), None
    try:
        assets = parse_json(read_text(RELEASE_FACTS))["assets"]
        asset = next(asset for asset in assets if asset["name"] == name)
        digest, size = asset.get("digest"), asset["size"]
    except (FetchError, ValueError, KeyError, TypeError, StopIteration):
        return None, None  # the file itself may still be available
    match = re.fullmatch(r"sha256:([0-9a-f]{64})", str(digest))
    return match[1] if match else None, size if isinstance(size, int) else None


def _sidecar(url: str) -> str | None:
    """Return the digest in a mirror's `NAME.sha256`, in the format of `sha256sum`; None if there is none."""
    try:
        match = re.match(r"([0-9a-fA-F]{64})\b", read_text(url, max_bytes=4096))
    except FetchError:
        return None
    return match[1].lower() if match else None
