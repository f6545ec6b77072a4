"""Run ClearML's SDK in a process that always ends, if necessary by a kill."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from starling.core import package
from starling.core.errors import UsageError
from starling.core.plain_json import parse_json
from starling.errors import ServerError

IDLE_S = 120.0
"""Seconds without progress, in the SDK's output and in its folder, after which the SDK is killed."""
CHUNK_BYTES = 512 << 20
"""Size of the archives that the SDK uploads; during the upload of an archive there is no other progress."""
_POLL_S = 0.25


class SdkError(ServerError):
    """The SDK failed, or was killed because it made no progress."""


def run_sdk(
    *words: str,
    folder: Path,
    environment: Mapping[str, str] = os.environ,
    idle_s: float = IDLE_S,
    show: Callable[[int], None] = lambda size: None,
) -> dict[str, Any]:
    """Run `sdk_process` with these words and return its answer.

    `folder` is the SDK's working folder: its cache, its temporary files and its results go there, because growth of the
    folder is the sign of progress; `show` gets the number of bytes. Raises SdkError, and UsageError if the
    package clearml is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("clearml") is None:
        raise UsageError("the package clearml is not installed; install requirements.txt")
    cache, temporary = folder / "cache", folder / "tmp"
    for place in (cache, temporary):
        place.mkdir(parents=True, exist_ok=True)
    inside = {
        **environment,
        "PYTHONPATH": package.python_path(environment),
        "CLEARML_CACHE_DIR": str(cache),
        "TMPDIR": str(temporary),
        "CLEARML_SUPPRESS_UPDATE_MESSAGE": "1",
    }
    # Inside an agent, the SDK would use the agent's task for the dataset.
    for name in ("CLEARML_TASK_ID", "TRAINS_TASK_ID", "CLEARML_PROC_MASTER_ID", "TRAINS_PROC_MASTER_ID"):
        inside.pop(name, None)
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "starling.tracking.clearml.client.sdk_process", *words],
            env=inside, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            _watch(process, output.fileno(), folder, idle_s, show)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a weaker signal does not end the SDK's threads
            process.wait()
        output.seek(0)
        lines = output.read().decode("utf-8", "replace").strip().splitlines()
    if process.returncode != 0:
        raise SdkError(f"ClearML's SDK failed: {_reason(lines)}")
    try:
        return dict(parse_json(lines[-1]))
    except (IndexError, ValueError, TypeError):
        raise SdkError(f"ClearML's SDK gave no answer: {_reason(lines)}") from None


def _watch(
    process: subprocess.Popen[bytes], output: int, folder: Path, idle_s: float, show: Callable[[int], None]
) -> None:
    """Wait for the process while there is progress; raises SdkError when there is none."""
    seen, since = (-1, -1), time.monotonic()
    while process.poll() is None:
        time.sleep(_POLL_S)
        size = bytes_below(folder)
        if (size, os.fstat(output).st_size) != seen:
            seen, since = (size, os.fstat(output).st_size), time.monotonic()
            show(size)
        elif time.monotonic() - since > idle_s:
            raise SdkError(f"nothing moved for {idle_s:g} s; ClearML's SDK was ended")


def bytes_below(folder: Path) -> int:
    """Return the total bytes of all files below a folder; links are not followed."""
    total = 0
    for current, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(current, name)).st_size
    return total


def _reason(lines: list[str]) -> str:
    """Return the last line that is not empty: in a traceback, the error."""
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "there was no output")
