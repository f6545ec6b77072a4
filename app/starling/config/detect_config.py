"""What one `detect.py` command asks for: parsed once, checked, frozen."""

from __future__ import annotations

from dataclasses import dataclass

from starling.config.sides import check_sides
from starling.errors import ConfigError, UsageError
from starling.outputs.run_dir import check_name


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectConfig:
    """One pass of a detector over pictures, videos or a stream. Field by field the flags of `detect.py`."""

    weights: tuple[str, ...] = ("yolov5s.pt",)
    """Weights; several are an ensemble."""
    source: str = ""
    """File, folder, glob, URL, .txt list, webcam number or stream; empty: the pictures this project carries."""
    data: str = ""
    """Dataset YAML, for its class names only; empty: the weights' own."""
    imgsz: tuple[int, ...] = (640,)
    """Side in pixels, or height and width; rounded up to the stride."""
    conf_thres: float = 0.25
    """Least confidence of a detection."""
    iou_thres: float = 0.45
    """Overlap above which the less confident of two boxes goes."""
    max_det: int = 1000
    """Most detections of one picture."""
    classes: tuple[int, ...] | None = None
    """Class numbers to keep; None: all."""
    agnostic_nms: bool = False
    """Suppress overlapping boxes whatever their classes."""
    augment: bool = False
    """Also look at each picture smaller, and mirrored."""
    device: str = ""
    """`cpu`, `0`, or empty: the first GPU if there is one."""
    half: bool = False
    """Autocast to bfloat16 where the hardware has it."""
    vid_stride: int = 1
    """Look at every so many frames of a video."""
    view_img: bool = False
    """Show pictures in a window."""
    nosave: bool = False
    """Write no annotated pictures and videos."""
    save_txt: bool = False
    """Write a label file a picture or frame."""
    save_csv: bool = False
    """Write predictions.csv."""
    save_conf: bool = False
    """Add the confidence to label files."""
    save_crop: bool = False
    """Write each detection as a picture of its own."""
    line_thickness: int = 3
    """Pixels of a box's line."""
    hide_labels: bool = False
    """Draw boxes without texts."""
    hide_conf: bool = False
    """Draw texts without confidences."""
    project: str = "runs/detect"
    """Folder below the runs folder."""
    name: str = "exp"
    """Run folder below the project."""
    exist_ok: bool = False
    """Write into an existing run folder."""
    json: bool = False
    """Print one JSON object as the last line."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self) -> None:
        """Check every value that can be checked without touching a file."""
        if not self.weights or not all(self.weights):
            raise ConfigError("--weights", self.weights, "give the path of a .pt file")
        check_sides(self.imgsz)
        for flag, value in (("--conf-thres", self.conf_thres), ("--iou-thres", self.iou_thres)):
            if not 0 <= value <= 1:
                raise ConfigError(flag, value, "must be from 0 to 1")
        for flag, number in (
            ("--max-det", self.max_det),
            ("--vid-stride", self.vid_stride),
            ("--line-thickness", self.line_thickness),
        ):
            if number < 1:
                raise ConfigError(flag, number, "must be at least 1")
        if self.line_thickness > 100:
            raise ConfigError("--line-thickness", self.line_thickness, "must be at most 100")
        if self.classes is not None and any(number < 0 for number in self.classes):
            raise ConfigError("--classes", self.classes, "classes count from 0")
        if self.save_conf and not self.save_txt:
            raise UsageError("--save-conf adds to label files: give --save-txt too")
        check_name(self.name)

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width asked for."""
        return self.imgsz[0], self.imgsz[-1]
