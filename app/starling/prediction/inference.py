"""Models with the interface of one detector: loaded from weights, ensembles, test-time augmentation, merged classes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starling.core.errors import CheckpointError
from starling.data.augment.letterbox import FILL
from starling.device import Compute
from starling.model.detector import Detector, build_detector
from starling.model.initial_weights import find_weights, read_weights
from starling.model.weights import load_weights

logger = logging.getLogger(__name__)

AUGMENTED_VIEWS: tuple[tuple[float, bool], ...] = ((1.0, False), (0.83, True), (0.67, False))
"""The scale of each view of test-time augmentation, and whether the view is mirrored."""


class Predictor(Protocol):
    """The interface of models for validation and detection; a `Detector` in eval mode has it."""

    names: tuple[str, ...]
    image_multiple: int
    """The sides of images must be multiples of this number."""

    @property
    def nc(self) -> int:
        """Number of classes."""
        ...

    def __call__(self, images: Tensor) -> Any:
        """Return (decoded [B,n,5+nc], raw predictions or None) of images [B,3,H,W] in 0..1."""
        ...


class _Wrapper(nn.Module):
    """A predictor that wraps others, and has their classes and strides."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.names: tuple[str, ...] = models[0].names  # type: ignore[assignment]
        self.image_multiple = max(int(model.image_multiple) for model in models)  # type: ignore[arg-type]

    @property
    def nc(self) -> int:
        """Number of classes."""
        return len(self.names)


class Ensemble(_Wrapper):
    """Several detectors of the same classes: suppression runs on the boxes of all detectors."""

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """Return the concatenated decoded predictions of all models, and None for the raw ones."""
        return torch.cat([model(images)[0] for model in self.models], dim=1), None


class Augmented(_Wrapper):
    """Test-time augmentation: one model processes each image at several scales, one of them mirrored."""

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """Return the decoded predictions of all views in pixels of `images`, and None for the raw ones."""
        decoded = []
        for scale, mirrored in AUGMENTED_VIEWS:
            seen = self.models[0](_view(images, scale, mirrored, self.image_multiple))[0].clone()
            seen[..., :4] /= scale
            if mirrored:
                seen[..., 0] = images.shape[3] - seen[..., 0]
            decoded.append(seen)
        return torch.cat(decoded, dim=1), None


class SingleClass(_Wrapper):
    """A model of several classes merged into one, whose score is that of the best class."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__(model)
        self.names = (name,)

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """Return decoded predictions [B,n,6], and None for the raw ones."""
        decoded = self.models[0](images)[0]
        return torch.cat((decoded[..., :5], decoded[..., 5:].amax(-1, keepdim=True)), dim=-1), None


def _view(images: Tensor, scale: float, mirrored: bool, stride: int) -> Tensor:
    """Return scaled images, padded with grey at the right and bottom to the next multiple of the stride."""
    if mirrored:
        images = images.flip(3)
    if scale == 1:
        return images
    height, width = (int(side * scale) for side in images.shape[2:])
    scaled = F.interpolate(images, (height, width), mode="bilinear", align_corners=False)
    return F.pad(scaled, (0, -width % stride, 0, -height % stride), value=FILL / 255)


def load_detector(name: str) -> Detector:
    """Return the detector that a weights file describes, its normalisations folded in. Raises CheckpointError."""
    weights = read_weights(find_weights(name))
    if weights.layout is None:
        raise CheckpointError(
            f"{weights.source}: holds tensors but no layout, so no detector can be built from it; "
            "use a checkpoint that train.py wrote, or one of the classic trainer"
        )
    nc = len(weights.names) or int(weights.layout.get("nc", 0))
    detector = build_detector(weights.layout, nc, names=weights.names or None)
    report = load_weights(detector, weights.state, source=str(weights.source))
    logger.info(f"weights: {weights.source}: {report.describe()}")
    return detector.fused()


def load_predictor(names: Sequence[str], compute: Compute, *, augment: bool = False) -> Predictor:
    """Return one model out of one or several weights files, on the device and in eval mode.

    Raises CheckpointError if a file cannot be used, or if several files have different classes.
    """
    detectors = [load_detector(name) for name in names]
    for name, detector in zip(names[1:], detectors[1:], strict=True):
        if detector.names != detectors[0].names:
            raise CheckpointError(
                f"--weights {name}: has the classes {_listed(detector.names)}, {names[0]} has "
                f"{_listed(detectors[0].names)}; an ensemble needs models of the same classes"
            )
    model: nn.Module = detectors[0] if len(detectors) == 1 else Ensemble(*detectors)
    if augment:
        model = Augmented(model)
    return model.to(compute.device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload, no-any-return]


def fit_classes(model: Predictor, names: tuple[str, ...], *, single_cls: bool, source: str) -> Predictor:
    """Return the model if it has the dataset's classes; with `single_cls` any model, with its classes merged.

    Raises CheckpointError with both lists of classes if they differ.
    """
    if single_cls:
        return model if model.nc == 1 else SingleClass(model, names[0])  # type: ignore[arg-type]
    unnamed = model.names == tuple(f"class{number}" for number in range(model.nc))
    if model.names == names or (unnamed and model.nc == len(names)):
        return model
    raise CheckpointError(
        f"--weights {source}: has {model.nc} classes ({_listed(model.names)}), the dataset has {len(names)} "
        f"({_listed(names)}); validate on the dataset it was trained for, or with --single-cls to ignore classes"
    )


def _listed(names: Sequence[str], shown: int = 8) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
