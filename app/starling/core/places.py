"""Find out the kind of a path: a folder, an archive, a model, a table."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Literal, NamedTuple

from starling.core.files.kinds import IMAGE_SUFFIXES, UNREAD_IMAGE_SUFFIXES, suffix_of
from starling.core.files.regular import found, open_regular

PlaceKind = Literal["folder", "archive", "checkpoint", "model", "image", "table", "file", "special"]

_HEADS = (
    (b"PK\x03\x04", "zip archive"),
    (b"PK\x05\x06", "zip archive"),
    (b"\x1f\x8b", "gzip archive"),
    (b"BZh", "bzip2 archive"),
    (b"\xfd7zXZ\0", "xz archive"),
    (b"7z\xbc\xaf\x27\x1c", "7z archive"),
    (b"Rar!\x1a\x07", "rar archive"),
    (b"\x28\xb5\x2f\xfd", "zstd archive"),
)
_TAR_MARK, _TAR_AT = b"ustar", 257
_CHECKPOINTS = frozenset((".pt", ".pth"))
_MODELS = {
    ".onnx": "ONNX model",
    ".engine": "TensorRT engine",
    ".trt": "TensorRT engine",
    ".torchscript": "TorchScript model",
    ".tflite": "TensorFlow Lite model",
    ".pb": "TensorFlow model",
    ".h5": "Keras model",
    ".mlmodel": "Core ML model",
    ".safetensors": "safetensors file",
    ".weights": "Darknet weights file",
}
_TABLES = {".csv": "CSV table", ".json": "JSON file", ".xml": "XML file", ".parquet": "Parquet table"}


class Place(NamedTuple):
    """The kind of a path, and its description."""

    kind: PlaceKind
    words: str
    """The description, with an article: `a folder`."""


def look_at(path: Path) -> Place | None:
    """Return the kind of `path`, by its first bytes and its suffix; None if it does not exist. Links are followed."""
    try:
        state = found(path)
    except OSError:  # not accessible
        return None
    if state is None:
        return None
    if stat.S_ISDIR(state.st_mode):
        return Place("folder", "a folder")
    if not stat.S_ISREG(state.st_mode):
        return Place("special", "no regular file")
    suffix = suffix_of(path.name)
    if suffix in _CHECKPOINTS:
        return Place("checkpoint", f"a {suffix} file of weights")
    if archive := _archive(path):
        return Place("archive", f"a {archive}")
    if suffix in _MODELS:
        return Place("model", _with_article(_MODELS[suffix]))
    if suffix in IMAGE_SUFFIXES | UNREAD_IMAGE_SUFFIXES:
        return Place("image", "an image")
    if suffix in _TABLES:
        return Place("table", _with_article(_TABLES[suffix]))
    return Place("file", f"a {suffix} file" if suffix else "a file")


def _archive(path: Path) -> str | None:
    try:
        with open_regular(path) as file:
            head = file.read(_TAR_AT + len(_TAR_MARK))
    except OSError:
        return None
    for mark, words in _HEADS:
        if head.startswith(mark):
            return words
    return "tar archive" if head[_TAR_AT:] == _TAR_MARK else None


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'AEIOUX' else 'a'} {words}"


def names_in(folder: Path, suffixes: tuple[str, ...], most: int) -> list[str]:
    """Return up to `most` names of files with these suffixes in a folder, sorted; empty if it cannot be listed."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [name for name in names if suffix_of(name) in suffixes and not name.startswith(".")][:most]
