"""The start of a training: a layout, with or without weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from starling.config.shipped import find_config
from starling.config.yaml_reader import read_yaml
from starling.core.errors import CheckpointError, UsageError, suggest
from starling.core.files.refusals import readable
from starling.core.misplaced import misplaced
from starling.core.paths import at_home
from starling.model.checkpoint import is_own_checkpoint, load_checkpoint, require
from starling.model.detector import Detector, build_detector
from starling.model.official import OFFICIAL, another_family, official_name, official_weights
from starling.model.weights import LoadReport, load_weights
from starling.progress import aloud

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Weights:
    """Tensors read from a file, with the layout that they belong to."""

    source: Path
    state: dict[str, torch.Tensor]
    layout: dict[str, Any] | None
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class InitialWeights:
    """A layout and the initial weights; None for a training from scratch."""

    layout: dict[str, Any]
    weights: Weights | None
    layout_given: bool = False
    """Whether `--cfg` names the layout; then the layout's anchors are used, not those of the weights."""

    def anchors_are_provisional(self, anchors: float | None) -> bool:
        """Return whether `build` can only set placeholder anchors, which AutoAnchor must replace."""
        from_weights = self.weights is not None and not self.layout_given
        named = isinstance(self.layout.get("anchors"), list | tuple)
        return anchors is not None or not (named or from_weights)

    def build(self, names: tuple[str, ...], anchors: float | None) -> Detector:
        """Return a fresh detector for these classes, carrying what fits of the weights.

        `anchors` is a number per level that replaces the anchors of layout and weights.
        """
        detector = build_detector(
            self.layout, len(names), anchors=None if anchors is None else round(anchors)
        )
        detector.names = names
        if self.weights is not None:
            exclude = ("anchors",) if self.layout_given or anchors is not None else ()
            # If the classes differ from those of the weights, the head's convolutions stay fresh: that is fine-tuning.
            report = load_weights(
                detector, self.weights.state, partial=True, exclude=exclude, source=str(self.weights.source)
            )
            if not self.layout_given:
                self._check_all_fit(detector, report, anchors)
            logger.info(f"weights: {self.weights.source}: {report.describe()}")
        return detector

    def _check_all_fit(self, detector: Detector, report: LoadReport, anchors: float | None) -> None:
        """Raise CheckpointError with the tensors that did not fit, except in a head of another shape."""
        assert self.weights is not None
        head = f"model.{len(detector.model) - 1}."
        reshaped = anchors is not None or detector.names != self.weights.names
        misfits = [name for name in report.wrong_shape if not (reshaped and name.startswith(head))]
        if report.missing or misfits:
            raise CheckpointError(
                f"{self.weights.source}: does not fit its own layout: {report.describe()}; use another file, "
                "or name a layout with --cfg to take what fits"
            )


def check_freeze(detector: Detector, frozen: Sequence[int]) -> None:
    """Raise UsageError if `--freeze` leaves no parameter to train."""
    held = {
        id(parameter)
        for index in frozen_layers(detector, frozen)
        for parameter in detector.model[index].parameters()
    }
    if all(id(parameter) in held for parameter in detector.parameters()):
        count = len(detector.model)
        raise UsageError(
            f"--freeze {' '.join(map(str, frozen))}: nothing is left to train, the layout has {count} layers, "
            f"0 to {count - 1}; freeze fewer (10: the backbone of yolov5s)"
        )


def frozen_layers(detector: Detector, frozen: Sequence[int]) -> list[int]:
    """Return the layers that `--freeze` names: the first N for a single number N, else the layers of these numbers."""
    chosen = range(frozen[0]) if len(frozen) == 1 else frozen
    return [index for index in chosen if index < len(detector.model)]


def find_initial_weights(weights: str, cfg: str) -> InitialWeights:
    """Find `--weights` and `--cfg`. Raises UsageError or CheckpointError with the remedy."""
    loaded = read_weights(find_weights(weights)) if weights else None
    if cfg:
        return InitialWeights(read_yaml(find_config("layouts", cfg)), loaded, layout_given=True)
    if loaded is None:
        raise UsageError("--weights '' trains from scratch and needs a layout: add --cfg yolov5s.yaml")
    if loaded.layout is None:
        raise UsageError(
            f"--weights {loaded.source}: a plain state dict, tensors without a layout: name the layout with --cfg"
        )
    return InitialWeights(loaded.layout, loaded)


@readable(CheckpointError)
def local_weights(name: str) -> Path | None:
    """Return the path of a weights file named with or without `.pt`; None for published weights that are not here.

    Nothing is fetched. Raises CheckpointError with the remedy if the name is neither a file nor published weights.
    """
    given = at_home(name)
    for path in (given, Path(f"{given}.pt")):
        if path.is_file():
            if wrong := misplaced("--weights", path):
                raise CheckpointError(f"--weights {name}: {wrong}")
            return path
    if official_name(name) is not None:
        return None
    if wrong := misplaced("--weights", given):
        raise CheckpointError(f"--weights {name}: {wrong}")
    if other := another_family(given.name):
        raise CheckpointError(
            f"--weights {name}: no such file here ({given.absolute()}), and {other}, or the path of such a .pt file"
        )
    raise CheckpointError(
        f"--weights {name}: no such file here ({given.absolute()}){suggest(given.name, OFFICIAL)}; give the path "
        "of a .pt file, or train from scratch with --weights '' --cfg yolov5s.yaml"
    )


def find_weights(name: str) -> Path:
    """Return the path of a weights file, as `local_weights` does; fetch published weights named without a path."""
    path = local_weights(name)
    if path is not None:
        return path
    with aloud() as progress:
        return official_weights(str(official_name(name)), progress.show)


def read_weights(path: Path) -> Weights:
    """Return the weights of a checkpoint of this trainer, or of a foreign one, as float32 tensors."""
    if is_own_checkpoint(path):
        content = load_checkpoint(path)
        require(path, content, ("ema", "layout", "names"))
        state = {key: _float32(value) for key, value in content["ema"].items()}
        return Weights(path, state, content["layout"], tuple(content["names"]))
    from starling.model.foreign import read_foreign_checkpoint

    foreign = read_foreign_checkpoint(path)
    return Weights(path, dict(foreign.state_dict), foreign.layout, foreign.names)


def _float32(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.is_floating_point() else value
