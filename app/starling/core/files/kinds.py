"""Classify a dataset's files by name: readable images, unreadable kinds of images, and files that are no data."""

from __future__ import annotations

import os

IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp")
)
"""Suffixes, in lower case, of readable images. `.jfif` and `.jpe` are JPEG."""

UNREAD_IMAGE_SUFFIXES = frozenset(
    (
        *(".ai", ".apng", ".arw", ".avif", ".cr2", ".cr3", ".dcm", ".dds", ".dng", ".emf", ".eps", ".exr"),
        *(".fits", ".hdr", ".heic", ".heif", ".hif", ".ico", ".j2c", ".j2k", ".jls", ".jp2", ".jpc", ".jpf"),
        *(".jpx", ".jxl", ".jxr", ".nef", ".nrrd", ".orf", ".pbm", ".pcx", ".pfm", ".pgm", ".pic", ".pnm"),
        *(".ppm", ".psb", ".psd", ".qoi", ".raf", ".ras", ".raw", ".rw2", ".sgi", ".sr2", ".srw", ".svg"),
        *(".svgz", ".tga", ".wmf", ".xbm", ".xcf", ".xpm"),
    )
)
"""Suffixes of unreadable kinds of images, which are reported and counted in a dataset."""

_SYSTEM_NAMES = frozenset(
    (
        *("__macosx", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin"),
        *("system volume information", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini"),
    )
)
"""Names, in lower case, of files and folders that operating systems and network storage leave in folders."""


def suffix_of(name: str) -> str:
    """Return the suffix of a file's name in lower case, with its dot; empty if there is none."""
    return os.path.splitext(name)[1].lower()


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name in a folder of data does not belong to the data.

    Hidden names begin with a dot (`._x.jpg`, `.ipynb_checkpoints`, `.DS_Store`) or are names of system files.
    """
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def is_hidden_copy(path: str) -> bool:
    """Return whether a path in a list leads to a hidden copy of a file: `._x.jpg`, `__MACOSX/x.jpg`.

    Other folders with a leading dot may hold data on purpose.
    """
    *folders, name = path.replace("\\", "/").split("/")
    return name.startswith("._") or any(
        folder.lower() in _SYSTEM_NAMES or folder == ".ipynb_checkpoints" for folder in (*folders, name)
    )
