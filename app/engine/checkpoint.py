"""Checkpoints: tensors and plain values only, replaced atomically, verified by a digest when read."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from app.errors import CheckpointError
from app.outputs.atomic import write_atomic

FORMAT = "starling-1"


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` (tensors, numbers, text, lists, dicts) so that `path` is always whole.

    Raises CheckpointError with the path when it cannot be written; the old file is intact then.
    """
    content = {"format": FORMAT, **state}
    content["digest"] = _digest(content)
    try:
        write_atomic(path, lambda file: torch.save(content, file))
    except OSError as error:
        raise CheckpointError(
            f"{path}: the checkpoint could not be saved ({error.strerror}); the previous one is intact. "
            "Free some space or choose another --project"
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the state that `save_checkpoint` wrote, tensors on the CPU.

    Raises CheckpointError for a missing, damaged or foreign file; nothing in the file is ever executed.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; check the path")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
    ) as error:
        raise CheckpointError(
            f"{path}: not a checkpoint of this trainer, or damaged ({_first_line(error)})"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this trainer")
    if content.pop("digest", None) != _digest(content):
        raise CheckpointError(
            f"{path}: damaged: its content does not match its digest; use another checkpoint"
        )
    return content


def is_own_checkpoint(path: Path) -> bool:
    """Return whether the file says that this trainer wrote it, without loading anything."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(entry for entry in archive.namelist() if entry.endswith("/data.pkl"))
            return FORMAT.encode() in archive.read(name)
    except (OSError, StopIteration, zipfile.BadZipFile, EOFError, ValueError):
        return False


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _digest(state: Mapping[str, Any]) -> str:
    """Return a digest of every tensor's bytes and every plain value, in order."""
    digest = hashlib.blake2b(digest_size=20)

    def feed(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            flat = value.detach().contiguous().cpu().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            digest.update(b"{")
            for key, item in value.items():
                digest.update(repr(key).encode())
                feed(item)
        elif isinstance(value, list | tuple):
            digest.update(b"[")
            for item in value:
                feed(item)
        else:
            digest.update(repr(value).encode())

    feed(state)
    return digest.hexdigest()
