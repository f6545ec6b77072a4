"""The model behind `mlflow models serve`: images in, boxes out. MLflow copies this one file beside the ONNX file.

So this module imports nothing of this project, and nothing that a server without torch may lack.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault(
    "OPENCV_IO_MAX_IMAGE_PIXELS", str(1 << 26)
)  # a header bomb is refused before its memory is taken

import cv2
import mlflow.models
import mlflow.pyfunc
import numpy as np
import onnxruntime
from mlflow.exceptions import MlflowException

MAX_BYTES = 32 << 20
"""Maximum length of an image in base64."""
_FILL = 114
_DATA_URL = re.compile(r"^data:image/[\w.+-]+;base64,")


class ServedDetector(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Return the detections of images (a column `image` of base64 text).

    Parameters of a request: `confidence`, `iou`, `max_detections`; the model's signature has their defaults.
    """

    def load_context(self, context: Any) -> None:
        """Open the ONNX file."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            context.artifacts["onnx"], options, providers=onnxruntime.get_available_providers()
        )
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.size_hw: tuple[int, int] = tuple(json.loads(metadata["imgsz"]))
        self.names = _names(metadata["names"])
        self.has_objectness = "objectness" in metadata.get("answer", "objectness")

    # MLflow would take a type annotation of `model_input` for the schema, but the signature defines the schema.
    def predict(self, context: Any, model_input, params: Mapping[str, Any] | None = None) -> Any:  # type: ignore[no-untyped-def]
        """Return one row per image: {"detections": [{"name", "class", "confidence", "box": [x1, y1, x2, y2]}]}.

        Boxes are in pixels of the image as sent. Raises MlflowException (status 400) with the number of an invalid row.
        """
        asked = params or {}
        confidence, iou, most = asked["confidence"], asked["iou"], asked["max_detections"]
        column = model_input["image"] if hasattr(model_input, "columns") else model_input
        return [
            {"detections": self._detect(_decode(text, row), confidence, iou, most)}
            for row, text in enumerate(column)
        ]

    def _detect(self, image: np.ndarray, confidence: float, iou: float, most: int) -> list[dict[str, Any]]:
        tensor, ratio, left, top = _letterbox(image, self.size_hw)
        (found,) = self.session.run(None, {self.session.get_inputs()[0].name: tensor})[0]
        if self.has_objectness:
            scores = found[:, 4:5] * found[:, 5:]
        else:  # [4+nc, points], as the anchor-free head exports it
            found = found.T
            scores = found[:, 4:]
        classes = scores.argmax(1)
        best = scores[np.arange(len(scores)), classes]
        seen = best > confidence
        found, classes, best = found[seen], classes[seen], best[seen]
        corners = found[:, :2] - found[:, 2:4] / 2
        xywh = np.concatenate((corners, found[:, 2:4]), axis=1)
        if not len(xywh):
            return []
        stays = cv2.dnn.NMSBoxesBatched(xywh.tolist(), best.tolist(), classes.tolist(), confidence, iou)
        kept = np.asarray(stays, dtype=int).reshape(-1)[:most]
        height, width = image.shape[:2]
        xyxy = np.concatenate((xywh[kept, :2], xywh[kept, :2] + xywh[kept, 2:]), axis=1)
        xyxy = (xyxy - np.array([left, top, left, top])) / ratio
        xyxy = xyxy.clip(0, np.array([width, height, width, height]))
        return [
            {
                "name": self.names[int(label)],
                "class": int(label),
                "confidence": round(float(score), 4),
                "box": [round(float(side), 2) for side in box],
            }
            for box, label, score in zip(xyxy, classes[kept], best[kept], strict=True)
        ]


def _decode(text: Any, row: int) -> np.ndarray:
    """Return an image [H,W,3] BGR, upright, from its base64 text or its bytes."""
    try:
        if isinstance(text, str):
            if len(text) > MAX_BYTES:
                raise ValueError(f"longer than {MAX_BYTES} letters")
            text = base64.b64decode(_DATA_URL.sub("", text), validate=True)
        _check_chunks(text)
        image = cv2.imdecode(np.frombuffer(text, np.uint8), cv2.IMREAD_COLOR)
        if image is None:
            raise ValueError("no format that is known")
    except (ValueError, TypeError, binascii.Error, cv2.error) as error:
        raise MlflowException.invalid_parameter_value(
            f"row {row}: `image` is not an image in base64 ({str(error)[:200]}); send a JPEG's or PNG's bytes as base64"
        ) from None
    return image


def _check_chunks(content: bytes) -> None:
    """Refuse a PNG with a chunk longer than the file: OpenCV allocates the memory before it checks the length."""
    at = 8 if content.startswith(b"\x89PNG") else len(content)
    while at + 8 <= len(content) and content[at + 4 : at + 8] != b"IEND":
        at += 12 + int.from_bytes(content[at : at + 4], "big")
        if at > len(content):
            raise ValueError("a PNG whose chunk claims more bytes than there are")


def _letterbox(image: np.ndarray, size_hw: Sequence[int]) -> tuple[np.ndarray, float, int, int]:
    """Return the image fitted into the model's input [1,3,H,W] 0..1 RGB, its scale, and its left and top offset."""
    height, width = size_hw
    ratio = min(height / image.shape[0], width / image.shape[1])
    new_h, new_w = max(round(image.shape[0] * ratio), 1), max(round(image.shape[1] * ratio), 1)
    left, top = (width - new_w) // 2, (height - new_h) // 2
    out = np.full((height, width, 3), _FILL, np.uint8)
    out[top : top + new_h, left : left + new_w] = cv2.resize(image, (new_w, new_h))
    return np.ascontiguousarray(out[..., ::-1].transpose(2, 0, 1)[None], np.float32) / 255, ratio, left, top


def _names(text: str) -> list[str]:
    """Return class names by number from the exporter's metadata, the text of a Python dict."""
    import ast

    return [str(name) for _, name in sorted(ast.literal_eval(text).items())]


mlflow.models.set_model(ServedDetector())
