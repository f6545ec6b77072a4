"""What a file of a dataset is by its name: an image, an image of a kind that is not read, or no data at all."""

from __future__ import annotations

import os

IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp")
)
"""Suffixes, in lower case, of the images that are read. `.jfif` and `.jpe` are JPEG."""

UNREAD_IMAGE_SUFFIXES = frozenset(
    (
        *(".ai", ".apng", ".arw", ".avif", ".cr2", ".cr3", ".dcm", ".dds", ".dng", ".emf", ".eps", ".exr"),
        *(".fits", ".hdr", ".heic", ".heif", ".hif", ".ico", ".j2c", ".j2k", ".jls", ".jp2", ".jpc", ".jpf"),
        *(".jpx", ".jxl", ".jxr", ".nef", ".nrrd", ".orf", ".pbm", ".pcx", ".pfm", ".pgm", ".pic", ".pnm"),
        *(".ppm", ".psb", ".psd", ".qoi", ".raf", ".ras", ".raw", ".rw2", ".sgi", ".sr2", ".srw", ".svg"),
        *(".svgz", ".tga", ".wmf", ".xbm", ".xcf", ".xpm"),
    )
)
"""Suffixes of other images, which are named and counted where they lie in a dataset."""

_SYSTEM_NAMES = frozenset(
    (
        *("__macosx", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin"),
        *("system volume information", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini"),
    )
)
"""Names, in lower case, of what operating systems, disk stations and editors leave in folders."""


def suffix_of(name: str) -> str:
    """Return the suffix of a file's name in lower case, with its dot; empty where there is none."""
    return os.path.splitext(name)[1].lower()


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name, found in a folder of data, is none of the data.

    Hidden are names that begin with a dot (`._x.jpg`, `.ipynb_checkpoints`, `.DS_Store`) and what systems leave behind.
    """
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def is_hidden_copy(path: str) -> bool:
    """Return whether a path that somebody wrote down leads to a hidden copy of a file: `._x.jpg`, `__MACOSX/x.jpg`.

    Other names with a dot in front may be folders that the data lies in on purpose.
    """
    *folders, name = path.replace("\\", "/").split("/")
    return name.startswith("._") or any(
        folder.lower() in _SYSTEM_NAMES or folder == ".ipynb_checkpoints" for folder in (*folders, name)
    )
