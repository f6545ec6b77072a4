"""Hyperparameters: the values that a search may change between candidates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from starling.core.errors import ConfigError, UsageError, suggest

_FRACTIONS = (
    "hsv_h",
    "hsv_s",
    "hsv_v",
    "flipud",
    "fliplr",
    "mosaic",
    "mixup",
    "copy_paste",
    "label_smoothing",
)


_YOLOV7 = "a key of YOLOv7, which has no counterpart here; remove the line"
_LATER = (
    "a key of Ultralytics' later trainers (YOLOv8 and on), which has no counterpart here; remove the line"
)
_SETTING = "a setting of Ultralytics' later trainers, not a hyperparameter; remove the line, and see --help for its flag"
FOREIGN_KEYS = {
    "giou": "the name of `box` in 2020, with the same meaning; write box instead",
    **dict.fromkeys(("xy", "wh"), "a gain of a loss of 2019, replaced by `box`; remove the line"),
    **dict.fromkeys(("loss_ota", "paste_in", "anchor_ota", "cls_pw_ota"), _YOLOV7),
    **dict.fromkeys(
        (
            *(
                "pose",
                "kobj",
                "rle",
                "angle",
                "nbs",
                "bgr",
                "cutmix",
                "erasing",
                "auto_augment",
            ),
            *(
                "crop_fraction",
                "copy_paste_mode",
                "overlap_mask",
                "mask_ratio",
                "dropout",
                "cos_lr",
                "label_smooth",
            ),
        ),
        _LATER,
    ),
    **dict.fromkeys(
        (
            *(
                "task",
                "mode",
                "model",
                "data",
                "epochs",
                "time",
                "patience",
                "batch",
                "imgsz",
                "save",
                "save_period",
            ),
            *(
                "cache",
                "device",
                "workers",
                "project",
                "name",
                "exist_ok",
                "pretrained",
                "optimizer",
                "verbose",
                "seed",
            ),
            *(
                "deterministic",
                "single_cls",
                "rect",
                "resume",
                "amp",
                "fraction",
                "profile",
                "freeze",
                "multi_scale",
            ),
            *(
                "val",
                "split",
                "save_json",
                "conf",
                "iou",
                "max_det",
                "half",
                "dnn",
                "plots",
                "classes",
                "cfg",
            ),
            *("tracker", "save_dir", "compile", "augment", "agnostic_nms", "vid_stride"),
        ),
        _SETTING,
    ),
}
"""Keys of other trainers' files, each with its meaning and the remedy."""

ANCHORS_ONLY = ("cls_pw", "obj", "obj_pw", "iou_t", "anchor_t", "anchors", "fl_gamma", "label_smoothing")
"""Hyperparameters without a meaning for an anchor-free head, whose sets leave them out."""
_LARGEST = 10**300
"""The largest integer; an integer in YAML may exceed every float."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hyp:
    """One set of hyperparameters; the defaults are those of `hyp.scratch-low.yaml`."""

    lr0: float = 0.01
    """Learning rate at the start."""
    lrf: float = 0.01
    """Learning rate at the end, as a fraction of lr0."""
    momentum: float = 0.937
    """SGD momentum, or Adam's beta1."""
    weight_decay: float = 0.0005
    """Weight decay at the nominal batch of 64."""
    warmup_epochs: float = 3.0
    """Epochs of warm-up; at least 100 iterations."""
    warmup_momentum: float = 0.8
    """Momentum at the start of warm-up."""
    warmup_bias_lr: float = 0.1
    """Learning rate of biases at the start of warm-up."""
    box: float = 0.05
    """Gain of the box loss."""
    cls: float = 0.5
    """Gain of the class loss."""
    cls_pw: float = 1.0
    """Weight of positives in the class loss."""
    dfl: float | None = None
    """Gain of the distribution loss of an anchor-free head; None for a head with anchors."""
    obj: float = 1.0
    """Gain of the objectness loss."""
    obj_pw: float = 1.0
    """Weight of positives in the objectness loss."""
    iou_t: float = 0.2
    """Unused; accepted for old files."""
    anchor_t: float = 4.0
    """Largest ratio of sides at which an anchor matches a label."""
    anchors: float | None = None
    """Anchors per level, found by AutoAnchor; None keeps the layout's anchors."""
    fl_gamma: float = 0.0
    """Focal loss gamma; 0 is plain BCE."""
    hsv_h: float = 0.015
    """Hue jitter, as a fraction."""
    hsv_s: float = 0.7
    """Saturation jitter, as a fraction."""
    hsv_v: float = 0.4
    """Value jitter, as a fraction."""
    degrees: float = 0.0
    """Rotation, +/- degrees."""
    translate: float = 0.1
    """Translation, +/- fraction of the side."""
    scale: float = 0.5
    """Scaling, 1 +/- gain."""
    shear: float = 0.0
    """Shear, +/- degrees."""
    perspective: float = 0.0
    """Perspective, +/- fraction, 0 to 0.001."""
    flipud: float = 0.0
    """Probability of an up-down flip."""
    fliplr: float = 0.5
    """Probability of a left-right flip."""
    mosaic: float = 1.0
    """Probability of a mosaic of four images."""
    mixup: float = 0.0
    """Probability of blending with a second mosaic."""
    copy_paste: float = 0.0
    """Probability of pasting a mirrored object; needs polygons."""
    close_mosaic: float | None = None
    """Epochs at the end that show no mosaics, rounded; None is none."""
    label_smoothing: float = 0.0
    """Epsilon of class targets: 1 - e/2 and e/2."""

    def __post_init__(self) -> None:
        """Raise ConfigError unless every value is finite and in its valid range."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if not math.isfinite(value) or value < 0:
                raise ConfigError(field.name, value, "must be a finite number, 0 or above")
            if field.name in _FRACTIONS and value > 1:
                raise ConfigError(field.name, value, "must be between 0 and 1")
        if self.anchor_t <= 1:
            raise ConfigError("anchor_t", self.anchor_t, "must be above 1")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], source: str = "hyp") -> Self:
        """Build from a YAML mapping; raises UsageError that names `source` for an unknown key or an invalid value."""
        known = [field.name for field in fields(cls)]
        values: dict[str, float | None] = {}
        for key, value in mapping.items():
            if key in FOREIGN_KEYS:
                others = [other for other in mapping if other in FOREIGN_KEYS and other != key]
                more = f"; other trainers' keys in this file too: {', '.join(others)}" if others else ""
                raise UsageError(f"{source}: {key!r} is {FOREIGN_KEYS[key]}{more}")
            if key not in known:
                raise UsageError(f"{source}: unknown hyperparameter {key!r}{suggest(key, known)}")
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise UsageError(f"{source}: {key}={value!r} must be a number")
            if isinstance(value, int) and abs(value) > _LARGEST:
                raise UsageError(f"{source}: {key} is too large a number")
            values[key] = None if value is None else float(value)
        try:
            return cls(**values)  # type: ignore[arg-type]
        except ConfigError as error:
            raise UsageError(f"{source}: {error}") from None

    def as_dict(self) -> dict[str, float]:
        """Return the values that are set and have a meaning, in the file's order."""
        idle = () if self.dfl is None else ANCHORS_ONLY
        return {key: value for key, value in asdict(self).items() if value is not None and key not in idle}
