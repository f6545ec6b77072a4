"""The conditions that the exactness of a resume depends on: machine, libraries, code and data files.

On the CPU a resumed training ends bit for bit like an uninterrupted one, as long as the conditions are the same. The
checkpoint records the conditions, and a resume under other conditions reports the differences.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from starling.core.cgroups import container_cpu_count
from starling.core.settings.train import TrainConfig
from starling.data.dataset.dataset import Dataset
from starling.device import Compute
from starling.training.reporting.provenance import code_version
from starling.training.setup.data import TrainingData

logger = logging.getLogger(__name__)

WHOLE_BYTES = 8 << 20
"""Files up to this size are read whole; nearly all images are smaller."""
_BLOCKS, _BLOCK = 64, 4096
"""Number and size in bytes of the blocks read of a larger file; the first and the last block are among them."""
_CHUNK = 64
"""Number of files that one task of the pool reads."""
SAVE_WAIT_S = 2.0
"""Longest time that a save waits for the digests: a stopped container has a short grace period."""
NOT_EQUAL = "this resume is not bit-equal: "
OTHER_DATA = "the figures and plots of the end are of other data than the training was: "
_SPLITS = {"train": "training", "val": "validation"}


class DataDigests:
    """Digests of a training's files, computed in threads while the training runs."""

    def __init__(self, data: TrainingData) -> None:
        """Start to compute the digests."""
        pool = ThreadPoolExecutor(min(container_cpu_count(), 8), "digests")
        self._parts: dict[str, tuple[Dataset, list[Future[list[int]]]]] = {
            name: (
                split,
                [
                    pool.submit(_file_digests, split.images[first : first + _CHUNK])
                    for first in range(0, len(split), _CHUNK)
                ],
            )
            for name, split in (("train", data.train), ("val", data.val))
        }
        pool.shutdown(wait=False)
        self._tables: dict[str, Tensor] | None = None

    def tables(self, wait_s: float | None = None) -> dict[str, Tensor]:
        """Return by split an int64 table [N,3]: a digest of each image's name, of its file, and of its labels.

        An empty mapping if the digests are not ready after `wait_s` seconds; None waits until they are ready.
        """
        if self._tables is None:
            pending = [future for _, futures in self._parts.values() for future in futures]
            if wait(pending, wait_s).not_done:
                return {}
            self._tables = {
                name: _table(split, [digest for future in futures for digest in future.result()])
                for name, (split, futures) in self._parts.items()
            }
            self._parts = {}
        return self._tables

    def cancel(self) -> None:
        """Cancel the digests whose computation has not begun."""
        for _, futures in self._parts.values():
            for future in futures:
                future.cancel()


def conditions(
    config: TrainConfig,
    compute: Compute,
    processes: int,
    data: TrainingData,
    digests: DataDigests,
    wait_s: float | None = None,
) -> dict[str, Any]:
    """Return the conditions that a checkpoint records: `machine`, strings by name, and `data`, the digest tables.

    `wait_s` is how long to wait for the tables, as in `DataDigests.tables`.
    """
    code = code_version()
    machine = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "code": f"{code.commit[:12]}{_short(code.diff)}" if code.commit else "unknown",
        "device": "cpu" if compute.on_cpu else torch.cuda.get_device_name(compute.device),
        "number format": "bfloat16" if compute.bfloat16 else "float32",
        "processes": str(processes),
        "augmentation": "CPU" if data.train_painter is None else "GPU",
        "compile": "on" if config.compile else "off",
        "epochs": str(config.epochs),
    }
    if compute.on_cpu:
        machine |= {
            "threads": str(torch.get_num_threads()),
            "CPU instructions": torch.backends.cpu.get_cpu_capability(),
        }
    else:
        machine |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
    return {"machine": machine, "data": digests.tables(wait_s)}


def differences(saved: Mapping[str, Any] | None, now: Mapping[str, Any], *, exact_kernels: bool) -> list[str]:
    """Return the differences that keep a resume from being bit-equal, a few words for each.

    `saved` is None for a checkpoint without conditions; `exact_kernels`: the device computes the same numbers in
    every run.
    """
    if not _is_record(saved):
        return ["the checkpoint does not record the conditions that it was made under"]
    assert saved is not None, "a record"
    before, after = saved["machine"], now["machine"]
    keys = dict.fromkeys((*before, *after))
    changed = [
        f"{key} {before.get(key, 'none')} → {after.get(key, 'none')}"
        for key in keys
        if before.get(key) != after.get(key)
    ]
    if saved["data"]:
        changed += data_differences(saved["data"], now["data"])
    else:
        changed.append("the checkpoint was saved before the digests of its data were ready")
    if not (exact_kernels or changed):
        changed.append("GPU kernels give other numbers in every run without --deterministic")
    return changed


def _is_record(saved: object) -> bool:
    """Return whether a checkpoint's entry has the form that `conditions` returns; a checkpoint may be foreign."""
    if not isinstance(saved, Mapping) or not isinstance(saved.get("machine"), Mapping):
        return False
    tables = saved.get("data")
    return isinstance(tables, Mapping) and all(
        isinstance(table, Tensor) and table.dtype == torch.int64 and table.dim() == 2 and table.shape[1] == 3
        for table in (tables.get(name) for name in (_SPLITS if tables else ()))
    )


def notes_of_resume(
    state: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    exact_kernels: bool,
    trains: bool = True,
) -> list[str]:
    """Print what keeps a resume from `state` from being bit-equal; return the notes of all resumes of the run so far.

    A resume that only finishes a run (not `trains`) does not change the weights; only the data are compared.
    """
    notes = [str(note) for note in state.get("notes", ())]
    saved = state.get("conditions")
    if trains:
        changed = differences(saved, now, exact_kernels=exact_kernels)
        note, where = NOT_EQUAL, f"from epoch {int(state['epoch']) + 1}: "
    else:
        changed = data_differences(_tables_of(saved), now["data"])
        note, where = OTHER_DATA, ""
    if changed:
        note += "; ".join(changed)
        logger.warning(note)
        notes.append(f"{where}{note}")
    return notes


def differences_of_moved(saved: Mapping[str, Any] | None, digests: DataDigests) -> list[str]:
    """Return how the data differ from the data that a checkpoint records; an empty list if it records no data."""
    tables = _tables_of(saved)
    return data_differences(tables, digests.tables()) if tables else []


def _tables_of(saved: Mapping[str, Any] | None) -> Mapping[str, Tensor]:
    """Return the digest tables that a checkpoint records; an empty mapping if it records none."""
    return saved["data"] if saved is not None and _is_record(saved) else {}


def data_differences(saved: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> list[str]:
    """Return for each split how many files were changed, added or removed; an empty list for equal data."""
    told = (
        _split_difference(saved[name], now[name], words) for name, words in _SPLITS.items() if name in saved
    )
    return [difference for difference in told if difference]


def _split_difference(saved: Tensor, now: Tensor, words: str) -> str:
    if torch.equal(saved[:, 1:], now[:, 1:]):
        return ""  # the same content in the same order; the paths may differ
    before = {row[0]: (row[1], row[2]) for row in saved.tolist()}
    after = {row[0]: (row[1], row[2]) for row in now.tolist()}
    common = before.keys() & after.keys()
    if not common:  # moved, and with other content: names cannot match the files, only contents can
        contents = [Counter((row[1], row[2]) for row in table.tolist()) for table in (saved, now)]
        images = labels = 0
        removed, added = (contents[0] - contents[1]).total(), (contents[1] - contents[0]).total()
    else:
        images = sum(before[name][0] != after[name][0] for name in common)
        labels = sum(before[name][1] != after[name][1] for name in common)
        removed, added = len(before) - len(common), len(after) - len(common)
    parts = []
    if images or labels:
        kinds = ((images, "image"), (labels, "label file"))
        which = " and ".join(f"{n} {kind}{'s' if n > 1 else ''}" for n, kind in kinds if n)
        parts.append(f"{images + labels} of {len(saved)} {words} files changed ({which})")
    parts += [
        f"{n} {words} image{'s' if n > 1 else ''} {what}"
        for n, what in ((added, "added"), (removed, "removed"))
        if n
    ]
    return ", ".join(parts) or f"the order of the {len(saved)} {words} images changed"


def _table(split: Dataset, files: list[int]) -> Tensor:
    names = [os.fspath(path) for path in split.images]
    root = os.path.commonpath([os.path.dirname(name) for name in names])
    rows = [
        (_number(os.fsencode(name.removeprefix(root))), file, _labels_digest(split, index))
        for index, (name, file) in enumerate(zip(names, files, strict=True))
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


def _labels_digest(split: Dataset, index: int) -> int:
    parts = [np.ascontiguousarray(split.labels[index]).tobytes()]
    for polygon in split.polygons[index] if split.polygons else ():
        parts.append(b"-" if polygon is None else polygon.tobytes())
    return _number(b"\0".join(parts))


def _file_digests(paths: Sequence[Path]) -> list[int]:
    return [_file_digest(path) for path in paths]


def _file_digest(path: Path) -> int:
    """Return a digest of a file's content; 0 if the file cannot be read: the training reports the error."""
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size <= WHOLE_BYTES:
                return _as_number(hashlib.file_digest(file, _hash).digest())
            step = (size - _BLOCK) / (_BLOCKS - 1)
            blocks = [os.pread(file.fileno(), _BLOCK, round(step * index)) for index in range(_BLOCKS)]
            return _number(b"".join([str(size).encode(), *blocks]))
    except OSError:
        return 0


def _hash(content: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(content, digest_size=8)


def _number(content: bytes) -> int:
    """Return a digest of `content` as a number that fits into int64."""
    return _as_number(_hash(content).digest())


def _as_number(digest: bytes) -> int:
    return int.from_bytes(digest, "little", signed=True)


def _short(diff: str) -> str:
    return f"+{hashlib.blake2b(diff.encode(), digest_size=4).hexdigest()}" if diff else ""
