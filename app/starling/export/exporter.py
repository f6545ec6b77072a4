"""Write a detector as TorchScript and ONNX, and only after the written form has given the detector's own answers."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable
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
from starling.progress import Progress

TOLERANCE = 1e-4
"""Largest difference of a score; of a coordinate, as a share of its pixels where these are above 1."""
HALF_TOLERANCE = 1e-2
"""The same where the arithmetic is float16, which has three digits."""
INPUT, OUTPUT = "images", "output0"


class _Decoded(nn.Module):
    """A detector that returns its decoded predictions alone."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Tensor:
        """Return the decoded predictions as the head exports them; see `Head.exported`."""
        return self.detector.head.exported(self.detector(images)[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How far a written form's answers lie from the detector's."""

    pixels: float
    """Largest difference of a coordinate."""
    scores: float
    """Largest difference of an objectness or class score."""
    worst: float
    """Largest difference of all as `TOLERANCE` counts it."""

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
    """A detector ready to be written, and an image to try it on."""

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
    """Write the formats asked for beside the weights.

    Raises StarlingError, and writes nothing, where a form's answers differ from the detector's.
    """
    progress = Progress()
    compute = _select_compute(config, progress.say)  # before weights are fetched
    weights = find_weights(config.weights)
    if not os.access(weights.absolute().parent, os.W_OK):
        raise UsageError(
            f"{weights.absolute().parent}: not writable, and outputs lie beside the weights; copy {weights.name} elsewhere"
        )
    job = _prepare(config, compute, progress.say)
    writers = {"torchscript": _torchscript, "onnx": _onnx}
    for name in dict.fromkeys(config.include):
        content, difference, usage = writers[name](job)
        if difference.worst > job.tolerance:
            raise StarlingError(
                f"{name}: its answers differ from the detector's by {difference.worst:.1e} "
                f"(at most {job.tolerance:.0e}), so it is not written; try another --opset, or --device cpu"
            )
        path = weights.with_suffix(f".{name}")
        write_atomic(path, content)
        progress.say(
            f"{path}  {len(content) / 1e6:.1f} MB  largest differences: {difference.pixels:.1e} px, "
            f"{difference.scores:.1e} in scores"
        )
        progress.say(f"    {usage.format(path=path)}")


def _select_compute(config: ExportConfig, say: Callable[[str], None]) -> Compute:
    compute = select_compute(config.device, "off", say)
    if config.half and compute.on_cpu:
        raise UsageError("--half: float16 is exported on a GPU, and none is here; leave --half out")
    return compute


def _prepare(config: ExportConfig, compute: Compute, say: Callable[[str], None]) -> _Job:
    detector = load_detector(config.weights, say)
    height, width = fit_size(config.size_hw, detector.image_multiple, say)
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
    say(
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
    """Return the traced module's file, its difference after loading, and how to use it."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that tracing is old is known; that a shape is a constant is meant
        traced = torch.jit.trace(job.module, job.images, strict=False)
        torch.jit.save(traced, buffer, _extra_files={"config.txt": json.dumps(job.metadata)})
        loaded = torch.jit.load(io.BytesIO(buffer.getvalue()), map_location=job.images.device)
        answer = loaded(job.images).float().cpu().numpy()
    usage = "torch.jit.load('{path}')(images)"
    return buffer.getvalue(), Difference.of(answer, _expected(job, job.images), job.head.answer_axis), usage


def _onnx(job: _Job) -> tuple[bytes, Difference, str]:
    """Return the ONNX file, the difference of ONNX Runtime's answers, and how to use it."""
    import onnx
    import onnxruntime

    buffer = io.BytesIO()
    axes = {
        INPUT: {0: "batch", 2: "height", 3: "width"},
        OUTPUT: {0: "batch", 3 - job.head.answer_axis: "anchors"},
    }
    with warnings.catch_warnings(), torch.no_grad():
        # The exporter that goes by TorchScript: the newer one writes no operator set below 18, which most runtimes
        # of phones want, and takes five times as long.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            job.module,
            (job.images,),
            buffer,  # type: ignore[arg-type]  # by TorchScript it takes a file object
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
    options.intra_op_num_threads = torch.get_num_threads()  # its own count knows no container
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def compare(images: Tensor) -> Difference:
        answer = session.run(None, {INPUT: images.cpu().numpy()})[0]
        return Difference.of(np.asarray(answer), _expected(job, images), job.head.answer_axis)

    trials = [job.images]
    if job.config.dynamic:  # another batch and another shape than the one it was made with
        stride = int(job.metadata["stride"])
        trials.append(F.pad(job.images, (0, stride)).repeat(2, 1, 1, 1))
    worst = max((compare(images) for images in trials), key=lambda difference: difference.worst)
    usage = f"onnxruntime.InferenceSession('{{path}}').run(None, {{{{'{INPUT}': images}}}})[0]"
    return content, worst, usage
