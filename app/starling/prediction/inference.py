"""Models that answer like one detector: read from weights, several joined, seen at several scales, classes merged."""

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
"""Scale of each view of test-time augmentation, and whether it is mirrored."""


class Predictor(Protocol):
    """What validation and detection ask of a model; a `Detector` in eval mode is one."""

    names: tuple[str, ...]
    image_multiple: int
    """What an image's sides must be multiples of."""

    @property
    def nc(self) -> int:
        """Number of classes."""
        ...

    def __call__(self, images: Tensor) -> Any:
        """Return (decoded [B,n,5+nc], raw predictions or None) of images [B,3,H,W] in 0..1."""
        ...


class _Wrapper(nn.Module):
    """A predictor around others; classes and strides are theirs."""

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
    """Several detectors of the same classes: suppression chooses among the boxes of all of them."""

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """Return the decoded predictions of all models, one after another, and no raw ones."""
        return torch.cat([model(images)[0] for model in self.models], dim=1), None


class Augmented(_Wrapper):
    """Test-time augmentation: one model sees each image at several scales, one of them mirrored."""

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """Return the decoded predictions of all views in the frame of `images`, and no raw ones."""
        decoded = []
        for scale, mirrored in AUGMENTED_VIEWS:
            seen = self.models[0](_view(images, scale, mirrored, self.image_multiple))[0].clone()
            seen[..., :4] /= scale
            if mirrored:
                seen[..., 0] = images.shape[3] - seen[..., 0]
            decoded.append(seen)
        return torch.cat(decoded, dim=1), None


class SingleClass(_Wrapper):
    """A model of several classes, asked only where something is: the score of the best class is that of the one."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__(model)
        self.names = (name,)

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """Return decoded predictions [B,n,6], and no raw ones."""
        decoded = self.models[0](images)[0]
        return torch.cat((decoded[..., :5], decoded[..., 5:].amax(-1, keepdim=True)), dim=-1), None


def _view(images: Tensor, scale: float, mirrored: bool, stride: int) -> Tensor:
    """Return images scaled and padded with grey, right and below, to the next multiple of the stride."""
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

    Raises CheckpointError for a file that cannot be used, or for several that know different classes.
    """
    detectors = [load_detector(name) for name in names]
    for name, detector in zip(names[1:], detectors[1:], strict=True):
        if detector.names != detectors[0].names:
            raise CheckpointError(
                f"--weights {name}: knows the classes {_listed(detector.names)}, {names[0]} knows "
                f"{_listed(detectors[0].names)}; an ensemble needs models of the same classes"
            )
    model: nn.Module = detectors[0] if len(detectors) == 1 else Ensemble(*detectors)
    if augment:
        model = Augmented(model)
    return model.to(compute.device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload, no-any-return]


def fit_classes(model: Predictor, names: tuple[str, ...], *, single_cls: bool, source: str) -> Predictor:
    """Return the model if it knows the dataset's classes; under `single_cls` any model, its classes merged.

    Raises CheckpointError naming both lists where they differ.
    """
    if single_cls:
        return model if model.nc == 1 else SingleClass(model, names[0])  # type: ignore[arg-type]
    unnamed = model.names == tuple(f"class{number}" for number in range(model.nc))
    if model.names == names or (unnamed and model.nc == len(names)):
        return model
    raise CheckpointError(
        f"--weights {source}: knows {model.nc} classes ({_listed(model.names)}), the dataset has {len(names)} "
        f"({_listed(names)}); validate on the dataset it was trained for, or with --single-cls to ignore classes"
    )


def _listed(names: Sequence[str], shown: int = 8) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
