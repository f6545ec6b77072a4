"""Write a detector as TorchScript and ONNX, after checking that each form gives the detector's outputs."""

from __future__ import annotations

import io
import json
import logging
import os
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from starling.core.errors import StarlingError, UsageError
from starling.core.files.atomic import write_atomic
from starling.core.settings.export import ExportConfig
from starling.device import Compute, select_compute
from starling.model.detector import Detector
from starling.model.head import Head
from starling.model.initial_weights import find_weights
from starling.prediction.inference import load_detector
from starling.prediction.predictor import fit_size

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""The largest difference of a score, or of a coordinate, relative to its value if that is above 1."""
HALF_TOLERANCE = 1e-2
"""The same limit for float16, which has three digits."""
INPUT, OUTPUT = "images", "output0"


class _Decoded(nn.Module):
    """A detector that returns only its decoded predictions."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Tensor:
        """Return the decoded predictions as the head exports them; see `Head.exported`."""
        return self.detector.head.exported(self.detector(images)[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The differences between a written form's outputs and the detector's."""

    pixels: float
    """The largest difference of a coordinate."""
    scores: float
    """The largest difference of an objectness or class score."""
    worst: float
    """The largest difference of all, in the measure of `TOLERANCE`."""

    @classmethod
    def of(cls, answer: np.ndarray, expected: np.ndarray, axis: int = 2) -> Difference:
        """Compare two answers [B, ..., ...], the numbers of a prediction along `axis`; another shape is infinitely far."""
        if answer.shape != expected.shape or not np.isfinite(answer).all():
            return cls(pixels=float("inf"), scores=float("inf"), worst=float("inf"))
        apart = np.abs(answer.astype(np.float64) - expected)
        scale = np.maximum(np.abs(expected), 1.0)
        coordinates, scores = np.split(apart, [4], axis=axis)
        return cls(
            pixels=float(coordinates.max()),
            scores=float(scores.max()),
            worst=float((apart / scale).max()),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """A detector to export, and images to check it with."""

    config: ExportConfig
    module: _Decoded
    images: Tensor
    metadata: dict[str, str]
    tolerance: float

    @property
    def head(self) -> Head:
        """The detector's head."""
        return self.module.detector.head


def export(config: ExportConfig) -> None:
    """Write the requested formats beside the weights.

    Raises StarlingError, without writing the form, if a form's outputs differ from the detector's.
    """
    compute = _select_compute(config)  # before weights are fetched
    weights = find_weights(config.weights)
    if not os.access(weights.absolute().parent, os.W_OK):
        raise UsageError(
            f"{weights.absolute().parent}: not writable, and outputs go beside the weights; copy {weights.name} elsewhere"
        )
    job = _prepare(config, compute)
    writers = {"torchscript": _torchscript, "onnx": _onnx}
    for name in dict.fromkeys(config.include):
        content, difference, usage = writers[name](job)
        if difference.worst > job.tolerance:
            raise StarlingError(
                f"{name}: its outputs differ from the detector's by {difference.worst:.1e} "
                f"(at most {job.tolerance:.0e}), so it is not written; try another --opset, or --device cpu"
            )
        path = weights.with_suffix(f".{name}")
        write_atomic(path, content)
        logger.info(
            f"{path}  {len(content) / 1e6:.1f} MB  largest differences: {difference.pixels:.1e} px, "
            f"{difference.scores:.1e} in scores"
        )
        logger.info(f"    {usage.format(path=path)}")


def _select_compute(config: ExportConfig) -> Compute:
    compute = select_compute(config.device, "off")
    if config.half and compute.on_cpu:
        raise UsageError("--half: float16 is exported on a GPU, and none is here; leave --half out")
    return compute


def _prepare(config: ExportConfig, compute: Compute) -> _Job:
    detector = load_detector(config.weights)
    height, width = fit_size(config.size_hw, detector.image_multiple)
    # Fixed noise: unlike grey, it makes every anchor answer something of its own.
    images = torch.rand((config.batch_size, 3, height, width), generator=torch.Generator().manual_seed(0))
    module = _Decoded(detector).to(compute.device).eval()
    images = images.to(compute.device)
    if config.half:
        module, images = module.half(), images.half()
    with torch.inference_mode():
        shape = list(module(images).shape)
    names = dict(enumerate(detector.names))
    metadata = {
        "stride": str(detector.image_multiple),
        "names": repr(names),
        "imgsz": json.dumps([height, width]),
        "batch": str(config.batch_size),
        "dynamic": str(config.dynamic).lower(),
        "answer": detector.head.answer,
    }
    logger.info(
        f"{compute.describe()}; {detector.count_parameters():,} parameters, {len(names)} classes; "
        f"{INPUT} {list(images.shape)} RGB 0..1 -> {OUTPUT} {shape}: "
        f"{detector.head.answer}"
    )
    return _Job(
        config=config,
        module=module,
        images=images,
        metadata=metadata,
        tolerance=HALF_TOLERANCE if config.half else TOLERANCE,
    )


def _expected(job: _Job, images: Tensor) -> np.ndarray:
    with torch.inference_mode():
        return job.module(images).float().cpu().numpy()


def _torchscript(job: _Job) -> tuple[bytes, Difference, str]:
    """Return the traced module's file, the differences after loading, and an example of its use."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter(
            "ignore"
        )  # ignore the deprecation of tracing, and warnings about constant shapes, which are intended
        traced = torch.jit.trace(job.module, job.images, strict=False)
        torch.jit.save(traced, buffer, _extra_files={"config.txt": json.dumps(job.metadata)})
        loaded = torch.jit.load(io.BytesIO(buffer.getvalue()), map_location=job.images.device)
        answer = loaded(job.images).float().cpu().numpy()
    usage = "torch.jit.load('{path}')(images)"
    return buffer.getvalue(), Difference.of(answer, _expected(job, job.images), job.head.answer_axis), usage


def _onnx(job: _Job) -> tuple[bytes, Difference, str]:
    """Return the ONNX file, the differences of ONNX Runtime's outputs, and an example of its use."""
    import onnx
    import onnxruntime

    buffer = io.BytesIO()
    axes = {
        INPUT: {0: "batch", 2: "height", 3: "width"},
        OUTPUT: {0: "batch", 3 - job.head.answer_axis: "anchors"},
    }
    with warnings.catch_warnings(), torch.no_grad():
        # Use the TorchScript exporter: the newer one takes five times as long, and cannot write operator sets below
        # 18, which most runtimes on phones need.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            job.module,
            (job.images,),
            buffer,  # type: ignore[arg-type]  # the TorchScript exporter accepts a file object
            dynamo=False,
            opset_version=job.config.opset,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes=axes if job.config.dynamic else None,
        )
    model = onnx.load_model_from_string(buffer.getvalue())
    for key, value in job.metadata.items():
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model, full_check=True)
    content = model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = (
        torch.get_num_threads()
    )  # ONNX Runtime's default ignores the container's limit
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def compare(images: Tensor) -> Difference:
        answer = session.run(None, {INPUT: images.cpu().numpy()})[0]
        return Difference.of(np.asarray(answer), _expected(job, images), job.head.answer_axis)

    trials = [job.images]
    if job.config.dynamic:  # also try another batch size and shape
        stride = int(job.metadata["stride"])
        trials.append(F.pad(job.images, (0, stride)).repeat(2, 1, 1, 1))
    worst = max((compare(images) for images in trials), key=lambda difference: difference.worst)
    usage = f"onnxruntime.InferenceSession('{{path}}').run(None, {{{{'{INPUT}': images}}}})[0]"
    return content, worst, usage
