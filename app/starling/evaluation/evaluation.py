"""Validate for a command line and write the files: one validation of a split, or a study over image sizes.

If the list of detections is truncated, the report says so, because the figures are then too low.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starling.boxes.geometry import iou_matrix, xyxy_to_xywhn
from starling.core.files.atomic import write_atomic
from starling.core.settings.val import ValConfig
from starling.data.cache.store import ImageStore
from starling.data.dataset.account import left_out
from starling.data.dataset.dataset import Dataset, DatasetDescription
from starling.data.dataset.unlabelled import check_boxes
from starling.data.fetch.find import find_dataset
from starling.data.loader.loader import ValLoader
from starling.device import Compute, select_compute
from starling.evaluation import plots
from starling.evaluation.coco import CocoPredictions
from starling.evaluation.mistakes import WorstImages, draw_worst
from starling.evaluation.validator import (
    INFERENCE,
    PRE_PROCESS,
    SUPPRESSION,
    ScoredImage,
    Validation,
    class_figures,
    class_table,
    validate,
)
from starling.model.initial_weights import local_weights
from starling.outputs.names import subjects_of
from starling.outputs.register import Register
from starling.outputs.run_dir import check_project, create_run_dir, runs_root
from starling.prediction.inference import Predictor, fit_classes, load_predictor
from starling.prediction.predictor import fit_stride, to_input
from starling.progress import Progress, console

logger = logging.getLogger(__name__)

TIMED = (PRE_PROCESS, INFERENCE, SUPPRESSION)
"""The stages whose time is reported."""
STUDY_SIZES: tuple[int, ...] = tuple(range(256, 1536 + 1, 128))
"""Image sides of a study in pixels."""
LISTED_CLASSES = 50
"""The most classes that are printed without --verbose."""

Sink = Callable[[ScoredImage], None]


class Stopwatch:
    """Adds up the seconds of each stage; synchronises with the device, so its work counts for the right stage."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._clock = device, clock
        self.seconds: dict[str, float] = {}
        self._at = clock()

    def __call__(self, stage: str) -> None:
        """End a stage and begin the next one."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = self._clock()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._at
        self._at = now

    def milliseconds(self, images: int) -> dict[str, float]:
        """Return the milliseconds per image of each reported stage."""
        return {stage: self.seconds.get(stage, 0.0) / images * 1000 for stage in TIMED}


class LabelFiles:
    """Writes detections as label files, one per image, empty without detections; `add` is a sink."""

    def __init__(
        self, folder: Path, stems: Sequence[str], *, confidence: bool, hybrid_iou: float | None
    ) -> None:
        """Write into `folder`, with the names `stems`, one per image.

        With `hybrid_iou`, the labels are written too, and detections that overlap a label by more are left out.
        """
        self._folder, self._stems = folder, stems
        self._confidence, self._hybrid_iou = confidence, hybrid_iou

    def add(self, image: ScoredImage) -> None:
        """Write one image's file: class, then x, y, width and height divided by the image's size, then confidence."""
        found = image.detections
        if self._hybrid_iou is not None:
            found = _with_labels(image, self._hybrid_iou)
        boxes_xywhn = xyxy_to_xywhn(found[:, :4], image.original_hw).tolist()
        lines = []
        for box, (confidence, kind) in zip(boxes_xywhn, found[:, 4:].tolist(), strict=True):
            numbers = [*box, confidence] if self._confidence else box
            lines.append(" ".join([f"{int(kind)}", *(f"{number:.6g}" for number in numbers)]) + "\n")
        write_atomic(self._folder / f"{self._stems[image.index]}.txt", "".join(lines))


def _with_labels(image: ScoredImage, iou: float) -> Tensor:
    """Return the labels as detections of confidence 1, and the detections that overlap no label of their class."""
    labels, found = image.labels, image.detections
    sure = torch.cat((labels[:, 1:], torch.ones(len(labels), 1), labels[:, :1]), dim=1)
    same_class = found[:, 5:6] == labels[:, 0][None]
    covered = (iou_matrix(found[:, :4], labels[:, 1:]) * same_class > iou).any(1)
    return torch.cat((sure, found[~covered]))


@dataclass(frozen=True, slots=True)
class _Bench:
    """The objects that all validations of one command share."""

    config: ValConfig
    compute: Compute
    data: Dataset
    progress: Progress

    def model(self, weights: Sequence[str]) -> Predictor:
        """Return the model of these weights, for the dataset's classes."""
        model = load_predictor(weights, self.compute, augment=self.config.augment)
        return fit_classes(
            model, self.data.names, single_cls=self.config.single_cls, source=" ".join(weights)
        )

    @property
    def cut(self) -> str | None:
        """The sentence that says why the list of detections is truncated; None if it is not."""
        return cut_list(self.data, self.config.conf_thres, self.config.max_det)

    def loader(self, model: Predictor, size: int) -> ValLoader:
        """Return the split in letterboxed batches; `--task speed` uses squares of one shape."""
        return ValLoader(
            self.data,
            ImageStore(self.data, size, "off"),  # a single pass needs no cache
            image_size=size,
            batch_size=self.config.batch_size,
            stride=model.image_multiple,
            rect=self.config.task != "speed",
            workers=self.compute.loader_threads(self.config.workers),
            pin_memory=not self.compute.on_cpu,
        )

    def validate(
        self, model: Predictor, size: int, *, previews: int = 0, sinks: Sequence[Sink] = ()
    ) -> tuple[Validation, dict[str, float]]:
        """Return the result of one pass over the split, and the milliseconds per image of each stage."""
        batches, total = self.loader(model, size), len(self.data)
        self._warm_up(model, batches)
        watch = Stopwatch(self.compute.device)

        def tell(image: ScoredImage) -> None:
            for sink in sinks:
                sink(image)

        validation = validate(
            model, batches, None, self.compute, previews=previews, on_image=tell, lap=watch,
            confidence=self.config.conf_thres, iou=self.config.iou_thres, max_detections=self.config.max_det,
            after_batch=lambda done: self.progress.show(lambda: f"{size} px: {done}/{total} images"),
        )  # fmt: skip
        return validation, watch.milliseconds(validation.images)

    @torch.no_grad()
    def _warm_up(self, model: Predictor, batches: ValLoader) -> None:
        """Run one forward pass before the timing, which loads and selects kernels."""
        indices, (height, width) = batches.batches[0]
        number = len(indices) if self.config.task == "speed" else 1
        with self.compute.autocast():
            model(to_input(torch.zeros((number, 3, height, width), dtype=torch.uint8), self.compute))


def _open_bench(config: ValConfig) -> _Bench:
    """Choose the device and read the split; what can be wrong with either is found here."""
    progress = console()
    check_project(config.project, runs_root())
    compute = select_compute(config.device, "auto" if config.half else "off")
    if config.half and not compute.bfloat16:
        logger.warning("--half: this hardware has no bfloat16, going on in float32")
    logger.info(compute.describe())
    for weights in config.weights:
        local_weights(weights)  # a wrong name is found before a dataset is fetched or read
    path = find_dataset(config.data, progress.show)
    description = DatasetDescription.from_yaml(path, single_cls=config.single_cls)
    data = Dataset.load(description, config.split)
    logger.info(f"{config.split}: {len(data)} images, {data.boxes} boxes")
    for line in left_out(data):
        logger.warning(line)
    check_boxes(description, config.split, data, "score")
    return _Bench(config, compute, data, progress)


def evaluate(config: ValConfig) -> dict[str, Any]:
    """Validate once, write the requested files, and return the figures for `--json`."""
    bench = _open_bench(config)
    data = bench.data
    model = bench.model(config.weights)
    size = fit_stride(config.imgsz, model.image_multiple)
    folder = create_run_dir(config.project, config.name, runs_root(), exist_ok=config.exist_ok)
    register, stems = _name_outputs(config, data, folder)
    worst, coco = WorstImages(), CocoPredictions(data, stems)
    sinks = [worst.add]
    if config.writes_labels:
        hybrid = config.iou_thres if config.save_hybrid else None
        sinks.append(LabelFiles(folder / "labels", stems, confidence=config.save_conf, hybrid_iou=hybrid).add)
    if config.save_json:
        sinks.append(coco.add)
    validation, milliseconds = bench.validate(model, size, previews=plots.PREVIEWS, sinks=sinks)
    for line in class_table(
        validation.metrics, data.distinct_names, classes=config.verbose or data.nc < LISTED_CLASSES
    ):
        logger.info(line)
    if bench.cut:
        logger.info(bench.cut)
    logger.info(
        "ms an image: "
        + ", ".join(f"{stage} {value:.1f}" for stage, value in milliseconds.items())
        + f"; batches of {min(config.batch_size, len(data))} at {size} px, {bench.compute.describe()}"
    )
    plots.draw_validation(validation, data, folder)
    draw_worst(worst, data, ImageStore(data, size, "off"), folder / "worst.jpg")
    classes = class_figures(validation.metrics, data.distinct_names)
    report = {
        **_figures(validation),
        "imgsz": size,
        "batch": config.batch_size,
        "classes": [{key: _rounded_figure(value) for key, value in row.items()} for row in classes],
        "cut_list": bench.cut,
        "left_out": data.left_out.as_list(),
        "ms_per_image": _rounded(milliseconds),
        "run": str(folder),
    }
    if config.save_json:
        report["coco"] = _score_as_coco(config, coco, validation, folder)
    if register is not None:
        report["outputs"], report["renamed"] = str(register.path), register.renamed
        if register.renamed:
            logger.info(
                f"{len(register.renamed)} images have an addition to their names in the outputs: {register.path}"
            )
    logger.info(f"results in {folder}")
    return report


def _name_outputs(config: ValConfig, data: Dataset, folder: Path) -> tuple[Register | None, list[str]]:
    """Return the name of each image's outputs, and write the register; None and no names without outputs."""
    if not (config.writes_labels or config.save_json):
        return None, []
    subjects = subjects_of(data.images)
    register = Register(folder, subjects)
    names = [register.of(subject) for subject in subjects]
    if config.writes_labels:
        for named in names:
            register.remove_earlier(named, ["labels"])
    register.write()
    return register, [named.base for named in names]


def _score_as_coco(
    config: ValConfig, coco: CocoPredictions, validation: Validation, folder: Path
) -> dict[str, float]:
    """Write the detections, score them with pycocotools, and print its figures beside ours."""
    path = folder / f"{Path(config.weights[0]).stem}_predictions.json"
    coco.write(path)
    logger.info(f"detections in COCO format: {path}")
    map50, map5095 = coco.score(config.max_det)
    m = validation.metrics
    logger.info(f"mAP50     pycocotools {map50:.4f}  here {m.map50:.4f}")
    logger.info(f"mAP50-95  pycocotools {map5095:.4f}  here {m.map5095:.4f}")
    return _rounded({"mAP50": map50, "mAP50_95": map5095})


def study(config: ValConfig) -> dict[str, Any]:
    """Validate each of the weights at every size, write tables and a plot, and return the figures."""
    from starling.plots.curves import StudyLine, plot_study

    bench = _open_bench(config)
    models = [bench.model((weights,)) for weights in config.weights]  # all, before the first takes its time
    folder = create_run_dir(config.project, config.name, runs_root(), exist_ok=config.exist_ok)
    lines, best = [], None
    if bench.cut:
        logger.info(bench.cut)
    for weights, label, model in zip(config.weights, _labels(config.weights), models, strict=True):
        rows: list[dict[str, Any]] = []
        table = folder / f"study_{Path(config.data).stem}_{label}.txt"
        for size in STUDY_SIZES:
            fitted = fit_stride(size, model.image_multiple)
            validation, milliseconds = bench.validate(model, fitted)
            figures = _figures(validation)
            rows.append(
                {
                    "imgsz": fitted,
                    "batch": config.batch_size,
                    **figures,
                    "ms_per_image": _rounded(milliseconds),
                }
            )
            write_atomic(
                table, _study_table(weights, rows)
            )  # write now, because the largest sizes may run out of memory
            total = sum(milliseconds.values())
            logger.info(
                f"{label}  {fitted:4d} px  mAP50-95 {figures['mAP50_95']:.3f}  {total:.1f} ms an image"
            )
            if best is None or figures["mAP50_95"] > best["mAP50_95"]:
                best = {**rows[-1], "weights": weights}
        lines.append(StudyLine(
            label,
            [row["imgsz"] for row in rows],
            [row["mAP50_95"] for row in rows],
            [sum(row["ms_per_image"].values()) for row in rows],
        ))  # fmt: skip
    plot_study(lines, folder / "study.png", place=bench.compute.describe())
    logger.info(f"results in {folder}")
    assert best is not None, "a study has sizes and weights"
    return {**best, "cut_list": bench.cut, "left_out": bench.data.left_out.as_list(), "run": str(folder)}


def _study_table(weights: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows of one model as a text table that numpy.loadtxt can read."""
    lines = [
        f"# {weights}",
        f"#{'imgsz':>5} {'P':>9} {'R':>9} {'mAP50':>9} {'mAP50-95':>9}  ms an image: {', '.join(TIMED)}",
    ]
    for row in rows:
        figures = [row[key] for key in ("precision", "recall", "mAP50", "mAP50_95")]
        times = [row["ms_per_image"][stage] for stage in TIMED]
        lines.append(" ".join([f"{row['imgsz']:6d}", *(f"{value:9.4g}" for value in [*figures, *times])]))
    return "\n".join(lines) + "\n"


def _labels(weights: Sequence[str]) -> list[str]:
    """Return a unique short name for each weights file: its stem, with a number if another file has it."""
    labels: list[str] = []
    for path in map(Path, weights):
        stem, number = path.stem, 2
        while stem in labels:
            stem, number = f"{path.stem}_{number}", number + 1
        labels.append(stem)
    return labels


def _figures(validation: Validation) -> dict[str, Any]:
    m = validation.metrics
    scores = {"precision": m.precision, "recall": m.recall, "mAP50": m.map50, "mAP50_95": m.map5095}
    return {**_rounded(scores), "images": validation.images, "labels": int(m.labels.sum())}


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: round(float(value), 5) for key, value in values.items()}


def _rounded_figure(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value


WHOLE_UP_TO = 0.01
"""A confidence threshold up to this value hardly truncates the curve of precision over recall."""


def cut_list(data: Dataset, confidence: float, max_detections: int) -> str | None:
    """Return a sentence that says why the list of scored detections is truncated; None if it is not."""
    reasons = []
    if confidence > WHOLE_UP_TO:
        reasons.append(
            f"no detection below confidence {confidence:g} (--conf-thres; complete up to {WHOLE_UP_TO:g})"
        )
    crowded = sum(len(rows) > max_detections for rows in data.labels)
    if crowded:
        most = max(len(rows) for rows in data.labels)
        reasons.append(
            f"{max_detections} detections an image, and images with more labels than that: {crowded} (up to {most})"
        )
    if not reasons:
        return None
    return f"figures of a cut list of detections, so recall and mAP are too low: {'; '.join(reasons)}"
