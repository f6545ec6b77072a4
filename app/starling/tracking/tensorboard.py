"""TensorBoard as a tracker: an `events.out.tfevents` file in each run directory, for `tensorboard --logdir runs`.

It uses TensorBoard's record format without TensorFlow; the import costs 0.3 s of CPU and 40 MB, only in the bridge.
"""

from __future__ import annotations

import fnmatch
import io
import os
import socket
import struct
import time as time_module
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from starling.core.files.refusals import refusal
from starling.core.files.safe_open import is_file, names_in, open_file, read_file
from starling.core.paths import real_path
from starling.core.redaction import without_credentials
from starling.tracking.tracker import (
    DatasetInput,
    ModelFile,
    Run,
    TrackerRejectedError,
    TrackerUnavailableError,
)

PATTERN = "events.out.tfevents.*"
_PARAMS = "params"


class TensorBoardTracker:
    """Write event files; see the `Tracker` protocol. The id of a run is its directory.

    Existing files of a run are read first, so that an event that is sent twice is written once.
    """

    name = "tensorboard"

    def __init__(self) -> None:
        self._writers: dict[str, _EventFile] = {}
        self._steps: dict[tuple[str, str], int] = {}
        """(Run, series) -> highest step in the run's files."""

    def destination(self, log_dir: Path) -> str:
        """Name the folder: from another path, all events are sent again, and compared with the existing files."""
        return f"files:{real_path(log_dir)}"

    def start_run(self, run: Run) -> str:
        """Open the run's file, and write the parameters."""
        run_id = str(run.directory)
        params = "\n".join(
            f"| {key} | {without_credentials(str(value))} |" for key, value in run.params.items()
        )
        self._add(run_id, _PARAMS, 0, run.time, _text(f"| name | value |\n|---|---|\n{params}"))
        self._flush()
        return run_id

    def log_metrics(self, run_id: str, values: Mapping[str, float], *, step: int, time: float) -> None:
        """Write scalars."""
        for name, value in values.items():
            self._add(run_id, name, step, time, {"simple_value": value})
        self._flush()

    def log_dataset(self, run_id: str, dataset: DatasetInput) -> None:
        """Write nothing: TensorBoard has no datasets."""

    def log_image(self, run_id: str, path: Path, name: str, *, step: int, time: float) -> None:
        """Write the image's file unchanged."""
        content, height, width = _image(path)
        image = {"height": height, "width": width, "colorspace": 3, "encoded_image_string": content}
        self._add(run_id, name, step, time, {"image": image})
        self._flush()

    def log_artifact(self, run_id: str, path: Path, folder: str, *, kind: str = "") -> None:
        """Write nothing: the file is already beside the event file."""

    def log_model(self, run_id: str, model: ModelFile) -> None:
        """Write nothing: the weights are already beside the event file."""

    def log_console(self, run_id: str, line: str, so_far: Callable[[], str], *, time: float) -> None:
        """Write nothing: TensorBoard shows only figures and images."""

    def log_system(self, run_id: str, values: Mapping[str, float], *, step: int, time: float) -> None:
        """Write scalars, with seconds as steps."""
        self.log_metrics(run_id, values, step=step, time=time)

    def flush(self, *, last: bool = False) -> None:
        """Do nothing: each call has already written its data."""

    def end_run(self, run_id: str, status: str, reason: str, *, time: float) -> None:
        """Close the run's file."""
        writer = self._writers.pop(run_id, None)
        if writer is not None:
            writer.close()

    def close(self) -> None:
        """Close all files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _add(self, run_id: str, name: str, step: int, time: float, value: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        writer = self._writer(run_id)
        if step <= self._steps.get((run_id, name), -1):
            return
        summary = Summary(value=[Summary.Value(tag=name, **value)])
        writer.add(Event(wall_time=time, step=step, summary=summary))
        self._steps[run_id, name] = step

    def _writer(self, run_id: str) -> _EventFile:
        if run_id not in self._writers:
            folder = Path(run_id)
            if not folder.is_dir():
                raise TrackerRejectedError(f"{folder} does not exist")
            try:
                self._steps |= {(run_id, name): step for name, step in _steps_in(folder).items()}
                self._writers[run_id] = _EventFile(folder)
            except OSError as error:
                reason = refusal(error) or f"{folder}: {error.strerror}"
                raise TrackerUnavailableError(f"TensorBoard: {reason}") from None
        return self._writers[run_id]

    def _flush(self) -> None:
        try:
            for writer in self._writers.values():
                writer.flush()
        except OSError as error:
            raise TrackerUnavailableError(f"TensorBoard: {error}") from None


class _EventFile:
    """A new event file of a run, in TensorBoard's format; TensorBoard's own writer would follow links."""

    def __init__(self, folder: Path) -> None:
        """Create the file. Raises OSError."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        # TensorBoard reads the files of a run in the order of their names, and two files may begin within a second.
        seconds, rest = divmod(now_ns := time_module.time_ns(), 10**9)
        name = PATTERN.replace(
            "*", f"{seconds:010d}.{rest:09d}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex}"
        )
        file = open_file(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        self._records = RecordWriter(os.fdopen(file, "wb"))
        self.add(Event(wall_time=now_ns / 1e9, file_version="brain.Event:2"))
        self.flush()

    def add(self, event: Any) -> None:
        """Append an event."""
        self._records.write(event.SerializeToString())

    def flush(self) -> None:
        """Write buffered events to disk. Raises OSError."""
        self._records.flush()

    def close(self) -> None:
        """Flush and close. Raises OSError."""
        self._records.close()


def _steps_in(folder: Path) -> dict[str, int]:
    """Return the highest step of each series in a run's event files; a partial last record is skipped."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    steps: dict[str, int] = {}
    for name in fnmatch.filter(names_in(folder), PATTERN):
        if not is_file(folder / name):
            continue
        for record in RawEventFileLoader(str(folder / name)).Load():
            try:
                event = Event.FromString(record)
            except DecodeError:
                continue  # the checksum is right, but the record is no event: other software wrote it
            for value in event.summary.value:
                steps[value.tag] = max(event.step, steps.get(value.tag, -1))
    return steps


def _text(markdown: str) -> dict[str, Any]:
    """Return the fields of a text summary."""
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.plugins.text.metadata import create_summary_metadata

    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype="DT_STRING", string_val=[markdown.encode()], tensor_shape=shape)
    return {"tensor": tensor, "metadata": create_summary_metadata(_PARAMS, "")}


def _image(path: Path) -> tuple[bytes, int, int]:
    """Return the content of an image file, its height and its width."""
    from PIL import Image

    try:
        content = read_file(path)
        with Image.open(io.BytesIO(content)) as image:
            return content, image.height, image.width
    except (OSError, struct.error, Image.DecompressionBombError) as error:
        raise TrackerRejectedError(f"{path}: no image ({error})") from None
