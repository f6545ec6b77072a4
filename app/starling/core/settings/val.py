"""The configuration of a `val.py` command: parsed once, checked, frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from starling.core.errors import UsageError
from starling.core.settings.declaration import UNIT, Config, at_least, setting
from starling.core.settings.parser import Command
from starling.core.settings.values import check_name

Task = Literal["val", "train", "test", "speed", "study"]
DEFAULT_PROJECT = "runs/val"
DEFAULT_NAME = "exp"
SPEED_CONFIDENCE, SPEED_IOU = 0.25, 0.45
"""Default thresholds of `--task speed`: those of detection, which give NMS its usual work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValConfig(Config):
    """One validation."""

    data: str = setting(
        "coco128.yaml",
        "dataset YAML, shipped name or path; its classes are those of the weights",
        heading="what to validate",
    )
    weights: tuple[str, ...] = setting(
        ("yolov5s.pt",),
        "weights, a path with or without .pt; several make an ensemble, or in a study one line each",
        metavar="PT",
    )
    task: Task = setting(
        "val", "val, train, test: the split; speed: time each stage; study: sizes 256 to 1536 by 128"
    )
    single_cls: bool = setting(False, "treat every class as one; weights of any classes will do")
    batch_size: int = setting(
        32, "images in one iteration", "--batch-size", "--batch", heading="how", check=at_least(1)
    )
    imgsz: int = setting(
        640,
        "image side, rounded up to the stride",
        "--imgsz",
        "--img",
        "--img-size",
        metavar="PIXELS",
        check=at_least(32),
    )
    conf_thres: float = setting(
        0.001,
        "least confidence of a detection",
        metavar="C",
        shown=f"0.001; speed: {SPEED_CONFIDENCE}",
        check=UNIT,
    )
    iou_thres: float = setting(
        0.6,
        "overlap above which NMS removes the less confident of two boxes",
        metavar="IOU",
        shown=f"0.6; speed: {SPEED_IOU}",
        check=UNIT,
    )
    max_det: int = setting(300, "most detections in an image", metavar="N", check=at_least(1))
    augment: bool = setting(False, "test-time augmentation: scales 1, 0.83 mirrored, 0.67")
    half: bool = setting(False, "bfloat16 if the hardware supports it, else float32")
    device: str = setting("", "cpu, or a GPU's number", shown="the first GPU, else cpu")
    workers: int = setting(
        8,
        "most loader threads: at most one per core, and one if the model runs on the CPU",
        check=at_least(0),
    )
    verbose: bool = setting(
        False, "print every class; up to 49 are printed anyway", heading="what to print and write"
    )
    json: bool = setting(False, "end with one line of JSON")
    save_txt: bool = setting(
        False,
        "write labels/*.txt: class x y width height, divided by the image's size; empty without detections",
    )
    save_conf: bool = setting(False, "write the confidence as a sixth column")
    save_hybrid: bool = setting(
        False,
        "write the labels, with confidence 1, and the detections that overlap no label; the figures do not change",
    )
    save_json: bool = setting(False, "write detections as COCO JSON, and score them with pycocotools")
    project: str = setting(DEFAULT_PROJECT, "folder below runs/; an absolute path is used unchanged")
    name: str = setting(DEFAULT_NAME, "run folder below the project", shown="exp, exp2, …")
    exist_ok: bool = setting(False, "write into an existing run folder")
    debug: bool = setting(False, "show tracebacks")

    def check_together(self) -> None:
        """Raise UsageError for values that exclude each other."""
        if not self.weights or not all(self.weights):
            raise UsageError("--weights: name at least one weights file")
        if "," in self.device:
            raise UsageError(f"--device {self.device}: one validation runs on one device; give one")
        check_name(self.name)

    @property
    def split(self) -> str:
        """The split of the dataset to validate on."""
        return self.task if self.task in ("train", "test") else "val"

    @property
    def writes_labels(self) -> bool:
        """Whether labels/*.txt are written."""
        return self.save_txt or self.save_hybrid


COMMAND = Command(
    name="val",
    description="Validate a detector: precision, recall, mAP, plots; optionally its detections as files.",
    config=ValConfig,
    examples="""\
  a trained detector on the validation split it was trained with
      python val.py --weights runs/train/exp/weights/best.pt --data bccd.yaml --img 320
  two models as one, each image seen at three scales
      python val.py --weights a.pt b.pt --data my/data.yaml --augment
  milliseconds an image
      python val.py --weights best.pt --data my/data.yaml --task speed --device 0 --batch 1
""",
)


def parse_args(argv: Sequence[str] | None = None) -> ValConfig:
    """Return the configuration from the command line; raises UsageError for invalid values."""
    given = COMMAND.given(argv)
    if given.get("task") == "speed":
        given = {"conf_thres": SPEED_CONFIDENCE, "iou_thres": SPEED_IOU, **given}
    return ValConfig(**given)
