"""The files of a detection run: annotated pictures and videos, label rows, a CSV, crops."""

from __future__ import annotations

import csv
import errno
import io
import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from app.config.detect_config import DetectConfig
from app.data.sources import Frame, Source
from app.errors import DataError
from app.outputs.atomic import append_line, atomic_path, write_atomic
from app.plots.drawing import draw_detections
from app.plots.style import class_name, save_picture

CSV_COLUMNS = ("image", "frame", "class", "name", "confidence", "x1", "y1", "x2", "y2")
KEPT_SUFFIXES = frozenset((".jpg", ".jpeg", ".png"))
"""Kinds that an annotated picture keeps; any other becomes a .jpg."""


class DetectionFiles:
    """Write what was found, one source at a time, below one run folder. Nothing is written outside it."""

    def __init__(self, folder: Path, names: tuple[str, ...], config: DetectConfig) -> None:
        """Prepare to write into `folder`; nothing is written before there is something to write."""
        self._folder = folder
        self._names = names
        self._config = config
        self._stems: set[str] = set()
        self.annotated: list[Path] = []
        """Pictures and videos written."""
        self.labels: Path | None = folder / "labels" if config.save_txt else None
        self.csv: Path | None = folder / "predictions.csv" if config.save_csv else None
        self.crops: Path | None = folder / "crops" if config.save_crop else None
        if self.csv:
            write_atomic(self.csv, ",".join(CSV_COLUMNS) + "\n")

    def open(self, source: Source) -> SourceFiles:
        """Return the writer of one source, to be closed; outputs of equal names get -2, -3, …"""
        name = Path(source.file_name)
        stem, number = name.stem, 1
        while stem in self._stems:
            number += 1
            stem = f"{name.stem}-{number}"
        self._stems.add(stem)
        suffix = name.suffix if name.suffix.lower() in KEPT_SUFFIXES else ".jpg"
        path = self._folder / f"{stem}{suffix if source.kind == 'picture' else '.mp4'}"
        return SourceFiles(self, source, stem, path)

    def write_csv(self, source: Source, frame: Frame, detections: np.ndarray[Any, Any]) -> None:
        """Append one row a detection, all of a frame in one write."""
        if self.csv is None or not len(detections):
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for x1, y1, x2, y2, confidence, kind in detections.tolist():
            corners = (f"{value:.1f}" for value in (x1, y1, x2, y2))
            name = self._names[int(kind)]
            writer.writerow((source.shown, frame.number, int(kind), name, f"{confidence:.4f}", *corners))
        append_line(self.csv, text.getvalue())

    def write_labels(self, stem: str, image: np.ndarray[Any, Any], detections: np.ndarray[Any, Any]) -> None:
        """Write class and normalised xywh, and the confidence if asked for; no file where nothing was found."""
        if self.labels is None or not len(detections):
            return
        height, width = image.shape[:2]
        rows = []
        for x1, y1, x2, y2, confidence, kind in detections.tolist():
            row = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
            row += [confidence] if self._config.save_conf else []
            rows.append(" ".join([str(int(kind)), *(f"{value:.6g}" for value in row)]))
        write_atomic(self.labels / f"{stem}.txt", "\n".join(rows) + "\n")

    def write_crops(self, stem: str, image: np.ndarray[Any, Any], detections: np.ndarray[Any, Any]) -> None:
        """Write each detection's part of the picture to crops/<class>/."""
        if self.crops is None:
            return
        height, width = image.shape[:2]
        for number, (x1, y1, x2, y2, _, kind) in enumerate(detections.tolist(), 1):
            left, top = max(int(x1), 0), max(int(y1), 0)
            right, bottom = min(int(np.ceil(x2)), width), min(int(np.ceil(y2)), height)
            if right > left and bottom > top:
                folder = self.crops / folder_name(self._names, int(kind))
                save_picture(
                    image[top:bottom, left:right],
                    folder / f"{stem}{'' if number == 1 else f'-{number}'}.jpg",
                )

    def draw(self, image: np.ndarray[Any, Any], detections: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return a copy of the picture with its detections drawn."""
        drawn = np.ascontiguousarray(image).copy()
        draw_detections(
            drawn,
            detections,
            self._names,
            thickness=self._config.line_thickness,
            with_text=not self._config.hide_labels,
            with_scores=not self._config.hide_conf,
        )
        return drawn

    @property
    def keeps_pictures(self) -> bool:
        """Whether annotated pictures and videos are written."""
        return not self._config.nosave


class SourceFiles:
    """The outputs of one source; a context manager that finishes its video."""

    def __init__(self, files: DetectionFiles, source: Source, stem: str, path: Path) -> None:
        """Write for `source` under names that begin with `stem`, its picture or video to `path`."""
        self._files = files
        self._source = source
        self._stem = stem
        self._path = path
        self._video: _VideoFile | None = None
        self._stack = ExitStack()

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._video is None:
            self._stack.__exit__(*error)  # a video that could not even be begun leaves nothing
        else:
            self._stack.close()  # finished even on an error: half a film is better than none

    def add(self, frame: Frame, detections: np.ndarray[Any, Any], drawn: np.ndarray[Any, Any] | None) -> None:
        """Write everything that was asked for of one picture or frame."""
        stem = self._stem if self._source.kind == "picture" else f"{self._stem}_{frame.number}"
        self._files.write_labels(stem, frame.image, detections)
        self._files.write_csv(self._source, frame, detections)
        self._files.write_crops(stem, frame.image, detections)
        if drawn is None or not self._files.keeps_pictures:
            return
        if self._source.kind == "picture":
            save_picture(drawn, self._path)
            self._files.annotated.append(self._path)
            return
        if self._video is None:
            hw = (drawn.shape[0], drawn.shape[1])
            temporary = self._stack.enter_context(atomic_path(self._path))
            self._video = _VideoFile(temporary, self._path, frame.fps, hw)
            self._stack.callback(self._video.close)
            self._files.annotated.append(self._path)
        self._video.write(drawn)


class _VideoFile:
    """An mp4 whose frames all have the size of the first."""

    def __init__(self, path: Path, shown: Path, fps: float, hw: tuple[int, int]) -> None:
        """Begin the file at `path`, which messages call `shown`."""
        # MPEG-4 part 2: the encoder that every build of OpenCV carries.
        self._writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (hw[1], hw[0]))
        if not self._writer.isOpened():
            raise DataError(f"{shown.parent}: a video of {hw[1]} x {hw[0]} cannot be written; try --nosave")
        self._path, self._shown, self._hw = path, shown, hw
        self._frames = 0

    def write(self, image: np.ndarray[Any, Any]) -> None:
        """Append one RGB frame."""
        if image.shape[:2] != self._hw:  # a stream may change its resolution
            image = cv2.resize(image, (self._hw[1], self._hw[0]), interpolation=cv2.INTER_AREA)
        self._writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        self._frames += 1

    def close(self) -> None:
        """Finish the file. Raises OSError where the disk has not taken all of it, which OpenCV does not say."""
        self._writer.release()
        written = cv2.VideoCapture(str(self._path))
        frames = written.get(cv2.CAP_PROP_FRAME_COUNT)
        written.release()
        if frames != self._frames:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._shown))


def folder_name(names: tuple[str, ...], index: int) -> str:
    """Return a class's name as one plain folder name: names come from files that anybody may have written."""
    name = re.sub(r"[^\w .+-]+", "_", class_name(names, index, longest=100)).strip(" .")
    return name or f"class {index}"
