"""Images by step, in files with the names that MLflow's page expects for its image chart."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from starling.core.files.safe_open import read_file

_THUMBNAIL_SIDE = 256


def as_shown(path: Path, key: str, step: int, time: float, folder: Path) -> list[Path]:
    """Write an image and its thumbnail into `folder`, named by key, step, time and digest; return both paths.

    Raises OSError for a file that is no image.
    """
    from PIL import Image

    content = read_file(path)
    digest = hashlib.sha256(content).hexdigest()[:32]
    stem = f"{key.replace('/', '~')}+step+{step}+timestamp+{int(time * 1000)}+{digest}"
    whole, small = folder / f"{stem}.png", folder / f"{stem}+compressed.webp"
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.convert("RGB").save(whole)
            image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
            image.convert("RGB").save(small)
    except Image.DecompressionBombError as error:
        raise OSError(f"{path}: {error}") from None
    return [whole, small]
