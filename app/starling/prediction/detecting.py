"""One `detect.py` run, from its sources to its results."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from starling.config.shipped import find_config
from starling.core.errors import DataError, UsageError
from starling.core.paths import real_path
from starling.core.settings.detect import DetectConfig
from starling.core.units import format_duration
from starling.data.dataset.dataset import DatasetDescription, read_class_names
from starling.data.dataset.findings import write_report
from starling.data.dataset.left_out import LeftOut
from starling.data.fetch.find import find_dataset
from starling.data.sources.films import Frame
from starling.data.sources.sources import Source, find_sources, frames
from starling.device import select_compute
from starling.outputs.names import distinct
from starling.outputs.run_dir import check_project, create_run_dir, runs_root
from starling.prediction.detection_files import DetectionFiles, SourceFiles
from starling.prediction.inference import Predictor, load_predictor
from starling.prediction.predictor import ImageDetector, Thresholds, fit_size
from starling.progress import Progress, console
from starling.stop_signal import StopSignal

logger = logging.getLogger(__name__)

LEFT_OUT = "left_out.csv"
"""The report in the run folder of sources and frames that were left out."""
NAMED_CLASSES = 6
"""The most classes named in a line; the line only counts the others."""


@dataclass(slots=True)
class Tally:
    """The counts of a run."""

    sources: int
    left_out: LeftOut
    """Everything that was left out, unreadable sources and damaged films included."""
    done: int = 0
    """The number of finished sources, unusable ones included."""
    frames: int = 0
    found: Counter[int] = field(default_factory=Counter)
    """Detections by class number."""
    skipped: list[str] = field(default_factory=list)
    """Sources that could not be read."""
    damaged: list[dict[str, Any]] = field(default_factory=list)
    """Films that end early: source, frames read, frames that the file lists."""

    def describe(self, found: Counter[int], names: tuple[str, ...]) -> str:
        """Return `44 RBC, 3 WBC`, the most frequent first."""
        parts = [f"{count} {names[index]}" for index, count in found.most_common(NAMED_CLASSES)]
        more = len(found) - NAMED_CLASSES
        return ", ".join([*parts, *([f"{more} classes more"] if more > 0 else [])]) or "nothing"


def detect(config: DetectConfig) -> None:
    """Look at every source and write what was asked for. Raises Stopped after a signal, results so far kept."""
    progress = console()
    check_project(config.project, runs_root())
    source = config.source or _sample_images()
    left_out = LeftOut()
    sources = find_sources(source, left_out)
    given = _given_names(config)  # before weights are fetched
    compute = select_compute(config.device, "auto" if config.half else "off")
    if config.half and not compute.bfloat16:
        logger.warning("--half: this hardware has no bfloat16, going on in float32")
    model = load_predictor(config.weights, compute, augment=config.augment)
    names = distinct(_names(config, model, given))
    _check_classes(config, names)
    detector = ImageDetector(
        model,
        compute,
        fit_size(config.size_hw, model.image_multiple),
        Thresholds(
            confidence=config.conf_thres,
            iou=config.iou_thres,
            max_detections=config.max_det,
            classes=config.classes,
            agnostic=config.agnostic_nms,
        ),
    )
    folder = _run_folder(config, sources)
    logger.info(f"{compute.describe()}; run: {folder}")
    run = _Run(
        config,
        DetectionFiles(folder, names, config, sources),
        names,
        detector,
        progress,
        Tally(len(sources), left_out),
    )
    with StopSignal() as stop:
        run.look_at_all(sources, stop)
    run.tell(stop)


class _Run:
    """The loop over sources and frames, and its messages."""

    def __init__(
        self,
        config: DetectConfig,
        files: DetectionFiles,
        names: tuple[str, ...],
        detector: ImageDetector,
        progress: Progress,
        tally: Tally,
    ) -> None:
        self._config = config
        self._names = names
        self._detector = detector
        self._progress = progress
        self._files = files
        self._tally = tally
        self._window = _Window() if config.view_img else None
        self._began = time.monotonic()

    def look_at_all(self, sources: list[Source], stop: StopSignal) -> None:
        """Process each source; an unreadable source is reported and left out, unless no source can be read."""
        for source in sources:
            if stop.requested:
                return
            try:
                with self._files.open(source) as outputs:
                    self._look_at(source, outputs, stop)
            except DataError as error:
                if len(sources) == 1:
                    raise
                logger.warning(f"left out: {error}")
                self._tally.skipped.append(source.shown)
                self._tally.left_out.add(
                    "sources that cannot be read", source.shown, "replace them, or remove them"
                )
            self._tally.done += 1
        if self._tally.frames == 0:
            raise DataError(
                f"--source {self._config.source}: none of {len(sources)} could be read; see above"
            )

    def _look_at(self, source: Source, outputs: SourceFiles, stop: StopSignal) -> None:
        fetched, ended = self._files.download(source), partial(self._tell_damage, source)
        with closing(frames(source, fetched, self._config.vid_stride, ended)) as stream:
            for place, frame in enumerate(stream, 1):
                detections = self._detector(frame.image)
                drawn = None
                if self._files.keeps_images or self._window:
                    drawn = self._files.draw(frame.image, detections)
                outputs.add(frame, detections, drawn)
                if self._window and drawn is not None:
                    self._window.show(drawn, source.shown)
                found = Counter(detections[:, 5].astype(int).tolist())
                self._tally.found.update(found)
                self._tally.frames += 1
                self._show(source, frame, place, found)
                if stop.requested:
                    return

    def _tell_damage(self, source: Source, read: int, listed: int | None) -> None:
        """Report and count a film that ends early."""
        part = f"{read} of {listed} frames" if listed else f"only the first {read} frames"
        logger.warning(f"{source.shown}: {part}: the file is damaged; copy it again, or convert it")
        self._tally.damaged.append({"source": source.shown, "frames": read, "listed": listed})
        reason, lost = ("frames of damaged films", listed - read) if listed else ("ends of damaged films", 1)
        self._tally.left_out.add(reason, source.shown, "replace the films", count=lost)

    def _show(self, source: Source, frame: Frame, place: int, found: Counter[int]) -> None:
        """Show a temporary line: position, detections, speed, and the remaining time if known."""
        tally = self._tally
        seconds = max(time.monotonic() - self._began, 1e-9)

        def line() -> str:
            inside = f" frame {place}/{frame.total or '?'}" if source.kind != "image" else ""
            text = f"{tally.done + 1}/{tally.sources} {source.shown}{inside}  {tally.describe(found, self._names)}"
            text += f"  {tally.frames / seconds:.1f} img/s"
            if frame.total:
                part = tally.done + min(place / frame.total, 1.0)
                text += f"  left {format_duration(seconds * (tally.sources - part) / part)}"
            return text

        self._progress.show(line)

    def tell(self, stop: StopSignal) -> None:
        """Print the counts and the folder of the results; raises Stopped if a signal ended the run."""
        tally = self._tally
        seconds = max(time.monotonic() - self._began, 1e-9)
        logger.info(
            f"{tally.frames} {'image' if tally.frames == 1 else 'images'} in {format_duration(seconds)}, "
            f"{sum(tally.found.values())} detections: {tally.describe(tally.found, self._names)}"
        )
        logger.info(self._detector.seconds.describe(tally.frames))
        for line in tally.left_out.lines():
            logger.warning(line)
        if len(tally.left_out):
            write_report(self._files.folder / LEFT_OUT, tally.left_out.findings())
        logger.info(f"results in {self._files.folder}")
        if self._config.json:
            self._progress.say(json.dumps(self._summary(seconds, stop), ensure_ascii=False))
        stop.raise_if_requested()

    def _summary(self, seconds: float, stop: StopSignal) -> dict[str, Any]:
        tally, files = self._tally, self._files
        return {
            "run": str(files.folder),
            "sources": tally.sources,
            "skipped": tally.skipped,
            "damaged": tally.damaged,
            "left_out": tally.left_out.as_list(),
            "frames": tally.frames,
            "detections": sum(tally.found.values()),
            "classes": {self._names[index]: count for index, count in sorted(tally.found.items())},
            "seconds": round(seconds, 3),
            "stopped": stop.requested,
            "outputs": str(files.register.path) if files.register.path.exists() else None,
            "renamed": files.register.renamed,
            "annotated": [str(path) for path in files.annotated],
            "labels": str(files.labels) if files.labels else None,
            "csv": str(files.csv) if files.csv else None,
            "crops": str(files.crops) if files.crops else None,
        }


class _Window:
    """A window that shows images; without a display, one line says why there is none."""

    def __init__(self) -> None:
        self._open = bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
        if not self._open:
            logger.warning("--view-img: no display here (DISPLAY is not set); look at the run folder's files")

    def show(self, image: np.ndarray[Any, Any], title: str) -> None:
        """Show an RGB image until the next one."""
        if not self._open:
            return
        try:
            cv2.imshow(title, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
            cv2.waitKey(1)
        except cv2.error:
            self._open = False
            logger.warning("--view-img: OpenCV is built without windows; look at the run folder's files")


def _sample_images() -> str:
    """Return the folder of the images that the project carries; raises UsageError where it lies elsewhere."""
    try:
        description = DatasetDescription.from_yaml(find_config("datasets", "bccd.yaml"))
    except DataError:
        raise UsageError(
            "--source is missing: give an image, video, folder, glob, URL, .txt list, webcam number or stream"
        ) from None
    folder = description.splits["val"][0]
    logger.info(f"no --source: looking at the images this project carries, {folder}")
    return str(folder)


def _given_names(config: DetectConfig) -> tuple[str, ...]:
    """Return the class names of `--data`; none without it."""
    return tuple(read_class_names(find_dataset(config.data))) if config.data else ()


def _names(config: DetectConfig, model: Predictor, given: tuple[str, ...]) -> tuple[str, ...]:
    """Return the class names of --data, else those of the weights; raises UsageError if their number is wrong."""
    if not config.data:
        return model.names
    if len(given) != model.nc:
        raise UsageError(
            f"--data {config.data}: {len(given)} names, but the weights have {model.nc} classes; leave it out, or fix it"
        )
    return given


def _check_classes(config: DetectConfig, names: tuple[str, ...]) -> None:
    for index in config.classes or ():
        if index >= len(names):
            raise UsageError(f"--classes {index}: the weights have classes 0 to {len(names) - 1}")


def _run_folder(config: DetectConfig, sources: list[Source]) -> Path:
    """Create the run folder; raises UsageError if outputs would replace sources."""
    folder = create_run_dir(config.project, config.name, runs_root(), exist_ok=config.exist_ok)
    for source in sources:
        if source.remote or source.kind == "stream":
            continue
        if real_path(folder) in real_path(str(source.address)).parents:
            raise UsageError(
                f"--exist-ok: {source.address} is in the run folder {folder} and could be replaced; choose another --name"
            )
    return folder
