"""The configuration of a `detect.py` command: parsed once, checked, frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starling.core.errors import ConfigError, UsageError
from starling.core.settings.declaration import UNIT, Check, Config, at_least, setting
from starling.core.settings.parser import Command
from starling.core.settings.values import check_name, check_sides


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectConfig(Config):
    """One pass of a detector over images, videos or a stream."""

    weights: tuple[str, ...] = setting(
        ("yolov5s.pt",),
        "weights; several make an ensemble, of the same classes",
        heading="sources and weights",
        metavar="PT",
    )
    source: str = setting(
        "",
        "image, video, folder, glob, URL, .txt list, webcam number, or rtsp:// stream; one stream per command",
        shown="the images this project carries",
    )
    data: str = setting("", "dataset YAML, for its class names only", shown="the weights' own")
    imgsz: tuple[int, ...] = setting(
        (640,),
        "one side, or height and width; rounded up to the stride",
        "--imgsz",
        "--img",
        "--img-size",
        metavar="PIXELS",
    )
    vid_stride: int = setting(
        1,
        "use every N-th frame of a video; the annotated video keeps its duration",
        metavar="N",
        check=at_least(1),
    )
    conf_thres: float = setting(
        0.25, "least confidence of a detection", heading="what counts", metavar="C", check=UNIT
    )
    iou_thres: float = setting(
        0.45, "overlap above which NMS removes the less confident of two boxes", metavar="IOU", check=UNIT
    )
    max_det: int = setting(1000, "most detections of one image", metavar="N", check=at_least(1))
    classes: tuple[int, ...] | None = setting(None, "class numbers to keep", metavar="N", shown="all")
    agnostic_nms: bool = setting(False, "let NMS compare boxes of different classes")
    augment: bool = setting(
        False, "test-time augmentation: scales 1, 0.83 mirrored, 0.67; slower, finds more"
    )
    device: str = setting(
        "", "cpu, or a GPU's number", heading="where it runs", shown="the first GPU, else cpu"
    )
    half: bool = setting(False, "bfloat16 if the hardware supports it, else float32")
    project: str = setting(
        "runs/detect", "folder below runs/; an absolute path is used unchanged", heading="what is written"
    )
    name: str = setting("exp", "run folder below the project", shown="exp, exp2, …")
    exist_ok: bool = setting(False, "write into an existing run folder; refused if it contains the sources")
    nosave: bool = setting(False, "write no annotated images and videos")
    save_txt: bool = setting(
        False,
        "write labels/*.txt, one file per image or frame: class x y width height, divided by the image's size",
    )
    save_conf: bool = setting(False, "add the confidence to label files; needs --save-txt")
    save_csv: bool = setting(False, "write predictions.csv, with corners in pixels")
    save_crop: bool = setting(False, "write each detection to crops/<class>/")
    line_thickness: int = setting(
        3,
        "width of a box's line",
        metavar="PIXELS",
        check=(at_least(1), Check(holds=lambda width: width <= 100, problem="must be at most 100")),
    )
    hide_labels: bool = setting(False, "draw boxes without texts")
    hide_conf: bool = setting(False, "draw texts without confidences")
    view_img: bool = setting(False, "show images in a window, if there is a display")
    json: bool = setting(False, "print counts and paths as one JSON object on the last line")
    debug: bool = setting(False, "show tracebacks")

    def check_together(self) -> None:
        """Raise UsageError for values that exclude each other."""
        if not self.weights or not all(self.weights):
            raise ConfigError("--weights", self.weights, "give the path of a .pt file")
        check_sides(self.imgsz)
        if self.classes is not None and any(number < 0 for number in self.classes):
            raise ConfigError("--classes", self.classes, "classes count from 0")
        if self.save_conf and not self.save_txt:
            raise UsageError("--save-conf adds to label files: give --save-txt too")
        check_name(self.name)

    @property
    def size_hw(self) -> tuple[int, int]:
        """The height and width from --imgsz."""
        return self.imgsz[0], self.imgsz[-1]


COMMAND = Command(
    name="detect",
    description="Find objects in images, videos and streams.",
    config=DetectConfig,
    refused={
        "--visualize": "feature maps are not drawn; leave the flag out",
        "--update": "weights are never rewritten; leave the flag out",
        "--dnn": "only .pt weights are run here; leave the flag out",
    },
    examples="""\
  a folder of images
      python detect.py --weights runs/train/exp/weights/best.pt --source my/images
  a video, every third frame, with label files
      python detect.py --weights best.pt --source street.mp4 --vid-stride 3 --save-txt --save-conf
  a camera, until Ctrl-C
      python detect.py --weights best.pt --source rtsp://camera.local/stream
  two detectors as one
      python detect.py --weights a.pt b.pt --source 'shots/**/*.jpg'
""",
)


def parse_args(argv: Sequence[str] | None = None) -> DetectConfig:
    """Return the configuration from the command line; raises UsageError for invalid values."""
    return DetectConfig(**COMMAND.given(argv))
