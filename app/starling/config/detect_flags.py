"""The command line of `detect.py`: the classic names and any unambiguous prefix."""

from __future__ import annotations

from collections.abc import Sequence

from starling.config.detect_config import DetectConfig
from starling.config.flags import CommandParser, Flag

EXAMPLES = """\
examples:
  a folder of pictures
      python detect.py --weights runs/train/exp/weights/best.pt --source my/pictures
  a video, every third frame, with label files
      python detect.py --weights best.pt --source street.mp4 --vid-stride 3 --save-txt --save-conf
  a camera, until Ctrl-C
      python detect.py --weights best.pt --source rtsp://camera.local/stream
  two detectors as one
      python detect.py --weights a.pt b.pt --source 'shots/**/*.jpg'
"""

REFUSED = {
    "--visualize": "feature maps are not drawn; leave the flag out",
    "--update": "weights are never rewritten; leave the flag out",
    "--dnn": "only .pt weights are run here; leave the flag out",
}

FLAGS: dict[str, tuple[Flag, ...]] = {
    "what to look at, and with what": (
        Flag("--weights", nargs="+", metavar="PT", help="weights; several are an ensemble [yolov5s.pt]"),
        Flag(
            "--source",
            help="picture, video, folder, glob, URL, .txt list, webcam number, or rtsp:// stream "
            "[the pictures this project carries]",
        ),
        Flag("--data", help="dataset YAML, for its class names only [the weights' own]"),
        Flag(
            "--imgsz",
            "--img",
            "--img-size",
            nargs="+",
            type=int,
            metavar="PIXELS",
            help="one side, or height and width; rounded up to the stride [640]",
        ),
        Flag("--vid-stride", metavar="N", help="look at every N-th frame of a video [%(default)s]"),
    ),
    "what counts": (
        Flag("--conf-thres", metavar="C", help="least confidence [%(default)s]"),
        Flag("--iou-thres", metavar="IOU", help="overlap that suppresses [%(default)s]"),
        Flag("--max-det", metavar="N", help="most detections of one picture [%(default)s]"),
        Flag("--classes", nargs="+", type=int, metavar="N", help="class numbers to keep [all]"),
        Flag("--agnostic-nms", help="suppress across classes"),
        Flag("--augment", help="test-time augmentation: scales 1, 0.83 mirrored, 0.67"),
    ),
    "where it runs": (
        Flag("--device", help="cpu, or a GPU's number [the first GPU, else cpu]"),
        Flag("--half", help="bfloat16 where the hardware has it"),
    ),
    "what is written": (
        Flag("--project", help="folder below runs/ [%(default)s]"),
        Flag("--name", help="run folder below the project [exp, exp2, …]"),
        Flag("--exist-ok", help="write into an existing run folder"),
        Flag("--nosave", help="write no annotated pictures and videos"),
        Flag("--save-txt", help="write labels/*.txt"),
        Flag("--save-conf", help="add the confidence to label files"),
        Flag("--save-csv", help="write predictions.csv"),
        Flag("--save-crop", help="write each detection to crops/<class>/"),
        Flag("--line-thickness", metavar="PIXELS", help="[%(default)s]"),
        Flag("--hide-labels", help="draw boxes without texts"),
        Flag("--hide-conf", help="draw texts without confidences"),
        Flag("--view-img", help="show pictures in a window, where there is a display"),
        Flag("--json", help="print counts and paths as one JSON object on the last line"),
        Flag("--debug", help="show tracebacks"),
    ),
}
"""The flags by the heading that --help shows them under."""


def build_parser() -> CommandParser:
    """Return the parser of `detect.py`."""
    return CommandParser.of(
        "detect.py",
        "Find objects in pictures, videos and streams.",
        EXAMPLES,
        FLAGS,
        DetectConfig(),
        REFUSED,
    )


def parse_args(argv: Sequence[str] | None = None) -> DetectConfig:
    """Return what the command line asks for; raises UsageError for what cannot work."""
    return DetectConfig(**build_parser().parse_given(argv, DetectConfig))
