"""Write detections in COCO's JSON format, and score them with pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from starling.core.errors import StarlingError
from starling.core.files.atomic import write_atomic
from starling.data.dataset.dataset import Dataset
from starling.evaluation.validator import ScoredImage

_IOU_50 = 0
"""The row of IoU 0.5 in COCO's precisions."""


def image_ids(stems: Sequence[str]) -> list[int | str]:
    """Return unique ids of images for COCO files: the number if the file's name is a number, else the name.

    Of `1` and `0001` only the shorter is a number.
    """
    numbers: dict[int, str] = {}
    for stem in sorted(filter(_is_number, stems), key=len, reverse=True):
        numbers[int(stem)] = stem
    return [int(stem) if _is_number(stem) and numbers[int(stem)] == stem else stem for stem in stems]


def _is_number(stem: str) -> bool:
    return stem.isdecimal() and stem.isascii()


class CocoPredictions:
    """Collects detections; `add` is a sink for `validate`. Categories are class numbers, from 0."""

    def __init__(self, data: Dataset, stems: Sequence[str] = ()) -> None:
        """Name the images of `data` by `stems`, or by their file names."""
        self._data = data
        self._ids = image_ids(stems or [path.stem for path in data.images])
        self._rows: list[dict[str, Any]] = []
        self._positions: list[int] = []
        """The position of each row's image in the dataset."""

    def add(self, image: ScoredImage) -> None:
        """Add one image's detections; boxes become [left, top, width, height] in pixels."""
        for box, (confidence, kind) in zip(
            _left_top_size(image.detections[:, :4]), image.detections[:, 4:].tolist(), strict=True
        ):
            self._rows.append(
                {
                    "image_id": self._ids[image.index],
                    "category_id": int(kind),
                    "bbox": [round(side, 3) for side in box],
                    "score": round(confidence, 5),
                }
            )
            self._positions.append(image.index)

    def write(self, path: Path) -> None:
        """Replace `path` with the detections."""
        write_atomic(path, json.dumps(self._rows))

    def score(self, max_detections: int) -> tuple[float, float]:
        """Return mAP50 and mAP50-95 by pycocotools, with the dataset's labels as ground truth.

        Raises StarlingError if pycocotools is not installed.
        """
        try:
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval
        except ImportError as error:
            raise StarlingError(
                f"--save-json: pycocotools cannot be imported ({error}); pip install pycocotools"
            ) from None
        if not self._rows:
            return 0.0, 0.0
        # Images are identified by position here, because two folders may hold images of the same name.
        found = [{**row, "image_id": at} for row, at in zip(self._rows, self._positions, strict=True)]
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress and a table
            truth = COCO()
            truth.dataset = _annotations(self._data)
            truth.createIndex()
            scoring = COCOeval(truth, truth.loadRes(found), "bbox")
            scoring.params.maxDets = [1, 10, max_detections]
            scoring.evaluate()
            scoring.accumulate()
        precision = scoring.eval["precision"][
            :, :, :, 0, -1
        ]  # IoU, recall, class; all areas, most detections
        return _mean(precision[_IOU_50]), _mean(precision)


def _annotations(data: Dataset) -> dict[str, Any]:
    """Return the dataset's labels as the content of a COCO annotation file, with images numbered by position."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for position, (labels, (height, width)) in enumerate(
        zip(data.labels, data.shapes_hw.tolist(), strict=True)
    ):
        images.append({"id": position, "width": width, "height": height})
        for kind, x, y, w, h in labels.tolist():
            annotations.append(
                {
                    "id": len(annotations) + 1,  # pycocotools treats the id 0 as "no match"
                    "image_id": position,
                    "category_id": int(kind),
                    "bbox": [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height],
                    "area": w * width * h * height,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(data.distinct_names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _left_top_size(boxes_xyxy: Tensor) -> list[list[float]]:
    boxes = boxes_xyxy.clone()
    boxes[:, 2:] -= boxes[:, :2]
    rows: list[list[float]] = boxes.tolist()
    return rows


def _mean(precision: np.ndarray) -> float:
    """Return the mean over classes with labels; pycocotools marks the others with -1."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else 0.0
