"""The command line of `val.py`."""

from __future__ import annotations

from collections.abc import Sequence

from starling.config.flags import CommandParser, Flag
from starling.config.val_config import TASKS, ValConfig

EXAMPLES = """\
examples:
  a trained detector on the validation split it was trained with
      python val.py --weights runs/train/exp/weights/best.pt --data bccd.yaml --img 320
  two models as one, each image seen at three scales
      python val.py --weights a.pt b.pt --data my/data.yaml --augment
  milliseconds an image
      python val.py --weights best.pt --data my/data.yaml --task speed --device 0 --batch 1
"""
SPEED_CONFIDENCE, SPEED_IOU = 0.25, 0.45
"""Thresholds of `--task speed` where none are given: those of detection, so that NMS has its usual work."""

FLAGS: dict[str, tuple[Flag, ...]] = {
    "what to validate": (
        Flag("--data", help="dataset YAML, shipped name or path [%(default)s]"),
        Flag("--weights", nargs="+", metavar="PT", help="weights; several make an ensemble [yolov5s.pt]"),
        Flag(
            "--task",
            choices=TASKS,
            help="val, train, test: the split; speed: time each stage; study: sizes 256 to 1536 [%(default)s]",
        ),
        Flag("--single-cls", help="treat every class as one"),
    ),
    "how": (
        Flag("--batch-size", "--batch", help="images in one iteration [%(default)s]"),
        Flag(
            "--imgsz",
            "--img",
            "--img-size",
            metavar="PIXELS",
            help="image side, rounded up to the stride [%(default)s]",
        ),
        Flag("--conf-thres", metavar="C", help="least confidence [%(default)s; speed: 0.25]"),
        Flag("--iou-thres", metavar="IOU", help="overlap that NMS allows [%(default)s; speed: 0.45]"),
        Flag("--max-det", metavar="N", help="most detections in an image [%(default)s]"),
        Flag("--augment", help="test-time augmentation: scales 1, 0.83 mirrored, 0.67"),
        Flag("--half", help="bfloat16 where the hardware has it"),
        Flag("--device", help="cpu, or a GPU's number [the first GPU, else cpu]"),
        Flag("--workers", help="most loader threads [%(default)s, at most one a core]"),
    ),
    "what to print and write": (
        Flag("--verbose", help="print every class, however many there are"),
        Flag("--json", help="end with one line of JSON"),
        Flag("--save-txt", help="write labels/*.txt: class x y width height, divided by the picture's size"),
        Flag("--save-conf", help="write the confidence as a sixth column"),
        Flag("--save-hybrid", help="write the labels, and the detections that are not on one"),
        Flag("--save-json", help="write detections as COCO JSON, and score them with pycocotools"),
        Flag("--project", help="folder below runs/ [%(default)s]"),
        Flag("--name", help="run folder below the project [exp, exp2, …]"),
        Flag("--exist-ok", help="write into an existing run folder"),
        Flag("--debug", help="show tracebacks"),
    ),
}
"""The flags by the heading that --help shows them under."""


def build_parser() -> CommandParser:
    """Return the parser of `val.py`."""
    return CommandParser.of(
        "val.py",
        "Validate a detector: precision, recall, mAP, pictures; optionally its detections as files.",
        EXAMPLES,
        FLAGS,
        ValConfig(),
    )


def parse_args(argv: Sequence[str] | None = None) -> ValConfig:
    """Return what the command line asks for; raises UsageError for what cannot work."""
    given = build_parser().parse_given(argv, ValConfig)
    if given.get("task") == "speed":
        given = {"conf_thres": SPEED_CONFIDENCE, "iou_thres": SPEED_IOU, **given}
    return ValConfig(**given)
