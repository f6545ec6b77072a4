"""Checkpoints hold only tensors and plain values, are replaced atomically, and are verified by a digest."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from starling.core.errors import CheckpointError
from starling.core.files.atomic import write_atomic
from starling.core.files.refusals import readable, refusal
from starling.core.files.regular import is_file
from starling.core.paths import at_home
from starling.core.words import shown
from starling.model.inert_pickle import PLAIN_GLOBALS
from starling.model.torch_file import StoredTensors, open_zip_form
from starling.outputs.run_dir import previous_of, runs_root

logger = logging.getLogger(__name__)

FORMAT = "starling-1"


def save_checkpoint(path: Path, state: Mapping[str, Any], *, previous: Path | None = None) -> None:
    """Write `state` (tensors, numbers, text, lists, dicts) atomically: `path` always holds a complete checkpoint.

    The old checkpoint in `path` moves to `previous`. If writing fails, the old file is intact: raises DiskFull if the
    disk refuses, UsageError for a folder that is a link, CheckpointError for any other reason.
    """
    content = {"format": FORMAT, **state}
    content["digest"] = _digest(content)
    try:
        write_atomic(path, lambda file: torch.save(content, file), previous=previous)
    except (OSError, RuntimeError) as error:
        cause = _disk_error(error)
        if cause is None:
            raise
        raise refusal(cause, path) or CheckpointError(
            f"{path}: the checkpoint could not be saved ({cause.strerror}); the previous one is intact. "
            "Check the folder's owner, or choose another --project"
        ) from error


def _disk_error(error: BaseException | None) -> OSError | None:
    """Return the OSError behind `error`, because torch raises its own RuntimeErrors while an OSError passes through."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


@readable(CheckpointError)
def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the state that `save_checkpoint` wrote, tensors on the CPU.

    Raises CheckpointError for a missing, damaged or foreign file; nothing in the file is executed.
    """
    if not is_file(path):
        raise CheckpointError(f"{shown(path)}: no such checkpoint; check the path")
    try:
        content = _read(path)
        digest = content.pop("digest", None)
        whole = content.get("format") == FORMAT and digest == _digest(content)
    except PermissionError:
        raise
    except Exception as error:  # a damaged or hostile file may raise almost any exception
        raise CheckpointError(
            f"{path}: not a checkpoint of this trainer, or damaged ({shown(error) or type(error).__name__})"
        ) from None
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this trainer")
    if not whole:
        raise CheckpointError(
            f"{path}: damaged: its content does not match its digest; use another checkpoint"
        )
    return content


def _read(path: Path) -> dict[str, Any]:
    """Return the content of the file, by the bounded reader: torch's own reader has no limit on time and memory."""
    with open_zip_form(path) as file:
        file.read_content(PLAIN_GLOBALS)
        content = StoredTensors(file).filled(file.content)
    if not isinstance(content, dict):
        raise CheckpointError("it holds no mapping")
    return content


def load_newest(last: Path) -> tuple[dict[str, Any], Path]:
    """Return the state in `last`, or in the checkpoint before it where `last` is damaged; and which it was.

    Raises the CheckpointError about `last` if neither can be read.
    """
    try:
        return load_checkpoint(last), last
    except CheckpointError as error:
        previous = previous_of(last)
        try:
            state = load_checkpoint(previous)
        except CheckpointError:
            raise error from None
        logger.warning(f"{error}; taking the one saved before it, {previous}")
        return state, previous


@readable(CheckpointError)
def find_last(resume: str) -> Path:
    """Return the checkpoint that `--resume` names; raises CheckpointError if there is none."""
    if resume != "latest":
        path = at_home(resume)
        return path / "weights" / "last.pt" if path.is_dir() else path
    found = sorted(
        (path for path in runs_root().rglob("weights/last*.pt") if _resumes(path.relative_to(runs_root()))),
        key=lambda path: path.stat().st_mtime,
    )
    if not found:
        raise CheckpointError(f"--resume: no weights/last.pt below {runs_root()}; give the checkpoint's path")
    return found[-1].with_name("last.pt")


def _resumes(path: Path) -> bool:
    """Return whether the file is the checkpoint of a run, not of a candidate of a search or a copy for a tracker."""
    own = "candidates" not in path.parts and path.parts[0] != "mlflow"
    return own and path.name in ("last.pt", "last.previous.pt")


def require(path: Path, content: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise CheckpointError with the names of missing entries of a checkpoint."""
    missing = [name for name in names if name not in content]
    if missing:
        raise CheckpointError(f"{path}: lacks {', '.join(missing)}; use another checkpoint")


def is_own_checkpoint(path: Path) -> bool:
    """Return whether the file claims to be written by this trainer, without loading anything."""
    try:
        with open_zip_form(path) as file:
            return FORMAT.encode() in file.read_pickle_bytes()
    except Exception:  # any exception, as above; the reader of foreign files reports the problem
        return False


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
