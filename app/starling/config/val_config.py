"""What one `val.py` command asks for: parsed once, checked, frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from starling.errors import ConfigError, UsageError
from starling.outputs.run_dir import check_name

Task = Literal["val", "train", "test", "speed", "study"]
TASKS: tuple[Task, ...] = get_args(Task)
DEFAULT_PROJECT = "runs/val"
DEFAULT_NAME = "exp"


@dataclass(frozen=True, kw_only=True, slots=True)
class ValConfig:
    """One validation. Field by field the flags of `val.py`."""

    data: str = "coco128.yaml"
    """Dataset YAML."""
    weights: tuple[str, ...] = ("yolov5s.pt",)
    """Weights files; several make an ensemble, in a study a line each."""
    batch_size: int = 32
    """Images in one iteration."""
    imgsz: int = 640
    """Image side in pixels; rounded up to the model's largest stride."""
    conf_thres: float = 0.001
    """Least confidence of a detection."""
    iou_thres: float = 0.6
    """Overlap above which the less confident of two boxes of one class goes."""
    max_det: int = 300
    """Most detections in one image."""
    task: Task = "val"
    """Split to validate on; `speed` and `study` use the validation split."""
    device: str = ""
    """`cpu`, `0`, or empty: the first GPU if there is one."""
    workers: int = 8
    """Most loader threads; never above the cores at hand."""
    single_cls: bool = False
    """Treat every class as one."""
    augment: bool = False
    """Test-time augmentation."""
    verbose: bool = False
    """Print every class, however many there are."""
    save_txt: bool = False
    """Write labels/*.txt."""
    save_hybrid: bool = False
    """Write the labels themselves too, and only detections that are not on one."""
    save_conf: bool = False
    """Write the confidence as well."""
    save_json: bool = False
    """Write detections as COCO JSON and score them with pycocotools."""
    project: str = DEFAULT_PROJECT
    """Folder below the runs folder."""
    name: str = DEFAULT_NAME
    """Run folder below the project."""
    exist_ok: bool = False
    """Write into an existing run folder."""
    half: bool = False
    """bfloat16 where the hardware has it."""
    json: bool = False
    """End with one line of JSON."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self) -> None:
        """Check every value that can be checked without touching a file."""
        if not self.weights or not all(self.weights):
            raise UsageError("--weights: name at least one weights file")
        for flag, value, least in (
            ("--batch-size", self.batch_size, 1),
            ("--imgsz", self.imgsz, 32),
            ("--max-det", self.max_det, 1),
            ("--workers", self.workers, 0),
        ):
            if value < least:
                raise ConfigError(flag, value, f"must be at least {least}")
        for flag, share in (("--conf-thres", self.conf_thres), ("--iou-thres", self.iou_thres)):
            if not 0 <= share <= 1:
                raise ConfigError(flag, share, "must be from 0 to 1")
        if self.task not in TASKS:
            raise ConfigError("--task", self.task, f"must be one of {', '.join(TASKS)}")
        if "," in self.device:
            raise UsageError(f"--device {self.device}: one validation runs on one device; give one")
        check_name(self.name)

    @property
    def split(self) -> str:
        """The split of the dataset to validate on."""
        return self.task if self.task in ("train", "test") else "val"

    @property
    def writes_labels(self) -> bool:
        """Whether labels/*.txt are asked for."""
        return self.save_txt or self.save_hybrid
