"""Write the files of a detection run: annotated images and videos, label files, a CSV, crops."""

from __future__ import annotations

import csv
import errno
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from starling.core.budget import BudgetExceeded
from starling.core.errors import DataError
from starling.core.files.atomic import append_line, atomic_path, write_atomic
from starling.core.files.file_system import folds_names, longest_name
from starling.core.files.regular import read_regular
from starling.core.settings.detect import DetectConfig
from starling.core.words import shown
from starling.data.sources.films import Frame
from starling.data.sources.sources import Source
from starling.outputs.names import Named, cut, distinct, folded, numbered
from starling.outputs.register import Kind, Register
from starling.plots.drawing import draw_detections
from starling.plots.style import save_image

CSV_COLUMNS = ("image", "frame", "class", "name", "confidence", "x1", "y1", "x2", "y2", "file")
_MOST_CSV_BYTES = 256 << 20
KEPT_SUFFIXES = frozenset((".jpg", ".jpeg", ".png"))
"""Suffixes that an annotated image keeps; any other becomes .jpg."""
ROOM_FOR_NUMBER = 25
"""Bytes reserved in a class's folder name for the number that distinguishes classes of equal names."""


class DetectionFiles:
    """Writes detections, one source at a time, into one run folder and nowhere else."""

    def __init__(
        self, folder: Path, names: tuple[str, ...], config: DetectConfig, sources: Sequence[Source]
    ) -> None:
        """Name the files of all `sources` and write the register of names; files of other sources are kept."""
        self.folder = folder
        self._names = names
        self._config = config
        subjects = numbered([source.subject for source in sources])
        self.register = Register(folder, subjects)
        self._named = {
            id(source): self.register.of(subject) for source, subject in zip(sources, subjects, strict=True)
        }
        self.annotated: list[Path] = []
        """The written images and films."""
        self.labels: Path | None = folder / "labels" if config.save_txt else None
        self.csv: Path | None = folder / "predictions.csv" if config.save_csv else None
        self.crops: Path | None = folder / "crops" if config.save_crop else None
        self._class_folders = class_folders(names, folder) if self.crops else ()
        if self.keeps_images or self.labels or self.csv or self.crops:
            self.register.write()
        if self.csv:
            of_sources = {source.shown for source in sources}
            write_atomic(self.csv, _kept_rows(self.csv, self.register, of_sources))

    def open(self, source: Source) -> SourceFiles:
        """Return the writer of one source, a context manager; removes an earlier run's files of the source."""
        named = self._named[id(source)]
        wanted: list[tuple[Kind, bool]] = [
            ("labels", self.labels is not None),
            ("crops", self.crops is not None),
            ("annotated", self.keeps_images),
        ]
        self.register.remove_earlier(named, [kind for kind, asked in wanted if asked])
        suffix = Path(source.file_name).suffix
        suffix = suffix if suffix.lower() in KEPT_SUFFIXES else ".jpg"
        path = self.folder / f"{named.base}{suffix if source.kind == 'image' else '.mp4'}"
        return SourceFiles(self, source, named, path)

    def download(self, source: Source) -> Path:
        """Return the path that a source's URL is downloaded to."""
        return self.folder / "downloads" / f"{self._named[id(source)].base}{Path(source.file_name).suffix}"

    def write_csv(self, source: Source, stem: str, frame: Frame, detections: np.ndarray[Any, Any]) -> None:
        """Append one row per detection, all rows of a frame in one write."""
        if self.csv is None or not len(detections):
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for x1, y1, x2, y2, confidence, kind in detections.tolist():
            corners = (f"{value:.1f}" for value in (x1, y1, x2, y2))
            name = self._names[int(kind)]
            where = (source.shown, frame.number, int(kind), name)
            writer.writerow((*where, f"{confidence:.4f}", *corners, stem))
        append_line(self.csv, text.getvalue())

    def write_labels(self, stem: str, image: np.ndarray[Any, Any], detections: np.ndarray[Any, Any]) -> None:
        """Write class and normalised xywh, and the confidence with --save-conf; no file without detections."""
        if self.labels is None or not len(detections):
            return
        height, width = image.shape[:2]
        rows = []
        for x1, y1, x2, y2, confidence, kind in detections.tolist():
            row = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
            row += [confidence] if self._config.save_conf else []
            rows.append(" ".join([str(int(kind)), *(f"{value:.6g}" for value in row)]))
        write_atomic(self.labels / f"{stem}.txt", "\n".join(rows) + "\n")

    def write_crops(self, named: Named, frame: Frame, detections: np.ndarray[Any, Any]) -> None:
        """Write each detection's part of the image to crops/<class>/."""
        if self.crops is None:
            return
        height, width = frame.image.shape[:2]
        written: Counter[int] = Counter()
        for x1, y1, x2, y2, _, kind in detections.tolist():
            left, top = max(int(x1), 0), max(int(y1), 0)
            right, bottom = min(int(np.ceil(x2)), width), min(int(np.ceil(y2)), height)
            if right > left and bottom > top:
                written[int(kind)] += 1
                name = named.crop(frame.number, written[int(kind)])
                folder = self.crops / self._class_folders[int(kind)]
                save_image(frame.image[top:bottom, left:right], folder / f"{name}.jpg")

    def draw(self, image: np.ndarray[Any, Any], detections: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return a copy of the image with its detections drawn."""
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
    def keeps_images(self) -> bool:
        """Whether annotated images and videos are written."""
        return not self._config.nosave


class SourceFiles:
    """The outputs of one source; a context manager that finishes its video."""

    def __init__(self, files: DetectionFiles, source: Source, named: Named, path: Path) -> None:
        """Write the files of `source` with the names of `named`, and the annotated image or film to `path`."""
        self._files = files
        self._source = source
        self._named = named
        self._path = path
        self._video: _VideoFile | None = None
        self._stack = ExitStack()

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._video is None:
            self._stack.__exit__(*error)  # no video was started: remove its temporary file
        else:
            self._stack.close()  # finish the video even on an error, because a part of it is useful

    def add(self, frame: Frame, detections: np.ndarray[Any, Any], drawn: np.ndarray[Any, Any] | None) -> None:
        """Write all requested files of one image or frame."""
        stem = self._named.stem(frame.number)
        self._files.write_labels(stem, frame.image, detections)
        self._files.write_csv(self._source, stem, frame, detections)
        self._files.write_crops(self._named, frame, detections)
        if drawn is None or not self._files.keeps_images:
            return
        if self._source.kind == "image":
            save_image(drawn, self._path)
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
    """An mp4 file; all frames are resized to the size of the first."""

    def __init__(self, path: Path, shown: Path, fps: float, hw: tuple[int, int]) -> None:
        """Start the file at `path`; messages name it `shown`. Raises DataError if OpenCV cannot write it."""
        # MPEG-4 part 2: every build of OpenCV has this encoder.
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
        """Finish the file; raises OSError if frames are missing on a full disk, which OpenCV does not report."""
        self._writer.release()
        written = cv2.VideoCapture(str(self._path))
        frames = written.get(cv2.CAP_PROP_FRAME_COUNT)
        written.release()
        if frames != self._frames:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._shown))


def class_folders(names: Sequence[str], place: Path) -> tuple[str, ...]:
    """Return a unique folder name in `place` for each class; class names are untrusted.

    A valid folder name stays unchanged. Classes with equal names, also after changes, get their numbers.
    """
    room = longest_name(place) - ROOM_FOR_NUMBER
    plain = [
        cut(_folder_name(name), room).strip(" .") or f"class {index}" for index, name in enumerate(names)
    ]
    if len({folded(name) for name in plain}) == len(plain):
        return tuple(plain)
    return distinct(plain, fold=folded if folds_names(place) else str)


def _folder_name(name: str) -> str:
    """Return a class's name without characters that Linux or Windows does not allow in folder names."""
    return "".join(
        letter if letter.isprintable() and letter not in r'/\:*?"<>|' else "_" for letter in name.strip(" .")
    )


def _rows(path: Path) -> Iterator[dict[str, str]]:
    try:
        text = read_regular(path, _MOST_CSV_BYTES).decode("utf-8", "surrogateescape")
        yield from csv.DictReader(io.StringIO(text, newline=""))
    except (BudgetExceeded, csv.Error) as error:
        raise DataError(
            f"{path}: its rows cannot be read ({shown(error)}), and would be lost; move it away"
        ) from None


def _kept_rows(path: Path, register: Register, of_sources: set[str]) -> bytes:
    """Return the header of a CSV and, if the file exists, its rows of sources outside this run."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in _rows(path) if path.is_file() else ():
        of_this_run = register.is_of_this_run(row["file"]) if row.get("file") else False
        if not of_this_run and (row.get("file") or row.get("image") not in of_sources):
            writer.writerow(row)
    return text.getvalue().encode("utf-8", "surrogateescape")
