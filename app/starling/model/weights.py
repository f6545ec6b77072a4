"""Load a state dict into a detector, and report what did not fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from starling.core.errors import CheckpointError
from starling.model.detector import Detector

_NAMED = 8
"""Maximum number of tensors that a message names; it counts the rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What happened to each tensor of the detector and of the state dict."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    """Tensors in the detector only."""
    wrong_shape: tuple[str, ...]
    """Tensors in both with different shapes; with another number of classes, the head's convolutions."""
    unused: tuple[str, ...]
    """Tensors in the state dict only."""
    excluded: tuple[str, ...] = ()
    """Tensors that the caller excluded."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Return the detector's tensors that keep their initial values."""
        return (*self.missing, *self.wrong_shape, *self.excluded)

    def describe(self) -> str:
        """Return one line for people: the number of loaded tensors, and the names of the others."""
        total = len(self.loaded) + len(self.left_out)
        parts = [f"loaded {len(self.loaded)} of {total} tensors"]
        kinds = {
            "missing": self.missing,
            "with another shape": self.wrong_shape,
            "kept as built": self.excluded,
            "not used": self.unused,
        }
        parts += [f"{kind}: {_listed(names)}" for kind, names in kinds.items() if names]
        return "; ".join(parts)


def load_weights(
    detector: Detector,
    state_dict: Mapping[str, Tensor],
    *,
    partial: bool = False,
    exclude: Collection[str] = (),
    source: str = "weights",
) -> LoadReport:
    """Copy every tensor that fits by name and shape into the detector, in place.

    `partial` allows missing tensors and wrong shapes, as in fine-tuning with other classes; otherwise they raise
    CheckpointError with their names, and nothing is copied. `exclude` holds suffixes of names to skip (`anchors`).
    A state dict of which less than half fits always raises CheckpointError: it belongs to another layout.
    """
    loaded, missing, wrong_shape, excluded = [], [], [], []
    own = detector.state_dict()
    for name, tensor in own.items():
        given = state_dict.get(name)
        if any(name.endswith(ending) for ending in exclude):
            excluded.append(name)
        elif given is None:
            missing.append(name)
        elif given.shape != tensor.shape:
            wrong_shape.append(name)
        else:
            loaded.append(name)
    report = LoadReport(
        loaded=tuple(loaded),
        missing=tuple(missing),
        wrong_shape=tuple(wrong_shape),
        unused=tuple(name for name in state_dict if name not in own),
        excluded=tuple(excluded),
    )
    if (missing or wrong_shape) and not partial:
        raise CheckpointError(f"{source} does not fit the detector: {report.describe()}")
    if len(loaded) * 2 < len(own) - len(excluded):
        raise CheckpointError(
            f"{source} belongs to another layout: {report.describe()}; give the layout it was trained with (--cfg)"
        )
    with torch.no_grad():
        for name in loaded:
            own[name].copy_(state_dict[name])
    return report


def _listed(names: tuple[str, ...]) -> str:
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + rest
