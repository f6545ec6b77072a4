"""What one `train.py` command asks for: parsed once, checked, frozen."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from starling.config.study_url import parse_study_url
from starling.errors import ConfigError, UsageError
from starling.outputs.bucket import check_bucket
from starling.outputs.run_dir import check_name

OPTIMIZERS = ("SGD", "Adam", "AdamW")
Cache = Literal["auto", "ram", "disk", "device", "val", "off"]
CACHES: tuple[Cache, ...] = get_args(Cache)
Sampler = Literal["fast", "classic", "random", "qmc", "gp"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
DEFAULT_SAMPLER: Sampler = "fast"
"""What finds most for the same images through the model; see "Which sampler" in docs/performance.md."""

AUTO_BATCH = -1
AUTO_FINALISTS = -1
AUTO_INTERVAL = -1

_OF_A_SEARCH = ("sampler", "space", "prune", "finalists", "study", "allow_nfs")
"""Fields that mean nothing without `evolve`."""

DEFAULT_PROJECT = "runs/train"
DEFAULT_SEARCH_PROJECT = "runs/evolve"
DEFAULT_NAME = "exp"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training, or one worker of a search. Field by field the flags of `train.py`."""

    weights: str = "yolov5s.pt"
    """Weights to start from; empty: from scratch."""
    cfg: str = ""
    """Layout YAML; empty: the one the weights carry."""
    data: str = "coco128.yaml"
    """Dataset YAML."""
    download: bool = False
    """Fetch the dataset first, as its description says, unless it is there."""
    hyp: str = "hyp.scratch-low.yaml"
    """Hyperparameter YAML."""
    epochs: int = 100
    """Epochs in all, those before a resume counted."""
    batch_size: int = 16
    """Images in one iteration over all devices; -1: as many as the GPU has room for."""
    imgsz: int = 640
    """Training image side in pixels; rounded up to the layout's largest stride."""
    resume: str = ""
    """Checkpoint to go on from, or `latest`."""
    nosave: bool = False
    """Keep the final checkpoint only."""
    noval: bool = False
    """Validate after the final epoch only."""
    noautoanchor: bool = False
    """Train with the anchors as they are, however they fit the labels."""
    noplots: bool = False
    """Draw no pictures."""
    evolve: int = 0
    """Finished trainings in the whole search; 0: train once."""
    sampler: Sampler = DEFAULT_SAMPLER
    """How a search proposes candidates: classic, fast, random, qmc or gp."""
    space: str = "classic.yaml"
    """What a search changes, and within which bounds: a space YAML."""
    prune: bool = False
    """End trainings of the search that fall behind early."""
    finalists: int = AUTO_FINALISTS
    """Candidates trained again on fresh seeds before one is named; -1: 3 with `--prune`, else none."""
    study: str = ""
    """URL of the database that the search's study lives in; empty: a journal in the search's folder."""
    allow_nfs: bool = False
    """Keep the journal on a network file system all the same."""
    cache: Cache = "auto"
    """Where decoded images are kept: auto, ram, disk, device, val (those of validation in ram), off."""
    device: str = ""
    """`cpu`, `0`, or empty: the first GPU if there is one. Several by commas: one process each."""
    sync_bn: bool = False
    """BatchNorm over the pictures of all devices."""
    local_rank: int = -1
    """Accepted from old starters and ignored."""
    single_cls: bool = False
    """Treat every class as one."""
    optimizer: str = "SGD"
    """SGD, Adam or AdamW."""
    workers: int = 8
    """Most loader threads; never above the cores at hand."""
    project: str = ""
    """Folder below the runs folder; empty: train, or evolve for a search."""
    name: str = ""
    """Run folder below the project; empty: exp, exp2, …"""
    exist_ok: bool = False
    """Write into an existing run folder."""
    cos_lr: bool = False
    """Cosine learning rate in place of linear."""
    label_smoothing: float = 0.0
    """Epsilon of label smoothing."""
    patience: int = 100
    """Epochs without a better fitness before training stops; 0: never."""
    freeze: tuple[int, ...] = (0,)
    """N: the first N layers; several numbers: those layers."""
    save_period: int = -1
    """Keep a checkpoint every so many epochs; below 1: no."""
    bbox_interval: int = AUTO_INTERVAL
    """Epochs between two pictures of what the validation finds; -1: a tenth of all, 0: none."""
    hooks: str = ""
    """Python file whose functions are called as training goes."""
    save_minutes: float = 10.0
    """Minutes between checkpoints within an epoch; 0: after each step."""
    seed: int = 0
    """Seed of everything random."""
    rect: bool = False
    """Train on batches of like aspect, each in its own shape, without mosaics."""
    quad: bool = False
    """Train on a quarter of the images at twice the side."""
    image_weights: bool = False
    """Draw training pictures by how rare and how badly found their classes are."""
    multi_scale: bool = False
    """Train at half to one and a half of the image size, another each iteration."""
    amp: str = "auto"
    """bfloat16 autocast: auto (where the hardware has it), on, off."""
    compile: bool = False
    """Train on the model as one compiled program; a CUDA graph on GPUs."""
    deterministic: bool = False
    """Choose GPU kernels that give the same numbers each time, which may be slower."""
    bucket: str = ""
    """URL of a folder in object storage that results are copied to at the end."""
    strict: bool = False
    """Stop at the first unusable picture or label instead of leaving it out."""
    remote: str = ""
    """ClearML queue whose agent is to run the command; empty: it runs here."""
    json: bool = False
    """End with one JSON object on standard output."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self) -> None:
        """Check every value that can be checked without touching a file."""
        if self.epochs < 1:
            raise ConfigError("--epochs", self.epochs, "must be at least 1")
        if self.batch_size < 1 and self.batch_size != AUTO_BATCH:
            raise ConfigError("--batch-size", self.batch_size, "must be at least 1, or -1 to fill the GPU")
        if self.quad and self.batch_size % 4:
            raise ConfigError("--batch-size", self.batch_size, "must be a multiple of 4 with --quad")
        if self.imgsz < 32:
            raise ConfigError("--imgsz", self.imgsz, "must be at least 32 pixels")
        if self.evolve < 0:
            raise ConfigError("--evolve", self.evolve, "must be at least 1")
        self._check_search()
        if self.workers < 0:
            raise ConfigError("--workers", self.workers, "must be 0 or more")
        if self.patience < 0:
            raise ConfigError("--patience", self.patience, "must be 0 (off) or more")
        if self.bbox_interval < AUTO_INTERVAL:
            raise ConfigError(
                "--bbox_interval", self.bbox_interval, "must be at least 1, 0 (none) or -1 (auto)"
            )
        if not self.save_minutes >= 0:
            raise ConfigError("--save-minutes", self.save_minutes, "must be 0 (after each step) or more")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError("--label-smoothing", self.label_smoothing, "must be from 0 to below 1")
        if any(layer < 0 for layer in self.freeze):
            raise ConfigError("--freeze", self.freeze, "layers count from 0")
        self._check_devices()
        if self.remote and self.resume and not self.evolve:
            raise UsageError(
                "--remote: a checkpoint is on this machine, not the agent's; leave --resume or --remote out"
            )
        if self.name:
            check_name(self.name)
        if self.bucket:
            check_bucket(self.bucket)

    def _check_search(self) -> None:
        """Check what only a search knows, and refuse it where there is none; a server is asked later."""
        if self.sampler not in SAMPLERS:
            raise ConfigError("--sampler", self.sampler, f"must be one of {', '.join(SAMPLERS)}")
        if self.finalists != AUTO_FINALISTS and (self.finalists < 0 or self.finalists == 1):
            raise ConfigError(
                "--finalists", self.finalists, "must be 0 (none) or at least 2, or there is no choice"
            )
        if self.study:
            parse_study_url(self.study)
        if self.study and self.allow_nfs:
            raise UsageError("--allow-nfs: is about the journal, and --study names a database; leave one out")
        for field in fields(self):
            given = getattr(self, field.name) != field.default
            if field.name in _OF_A_SEARCH and given and not self.evolve:
                flag = f"--{field.name.replace('_', '-')}"
                raise UsageError(f"{flag}: belongs to a search; add --evolve N, or leave it out")

    def _check_devices(self) -> None:
        """Check a list of devices by itself; whether they exist is found out later."""
        devices = self.devices
        if len(devices) < 2:
            return
        if self.evolve:
            raise UsageError(
                f"--device {self.device}: a search gives each device trainings of its own; start one worker a device, "
                "or all at once with `launcher up --gpus`"
            )
        if "cpu" in devices and set(devices) != {"cpu"}:
            raise UsageError(f"--device {self.device}: one training runs on GPUs or on CPUs, not on both")
        twice = next((name for name in devices if name != "cpu" and devices.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"--device {self.device}: names GPU {twice} twice; each takes one process")
        self.check_split(len(devices))

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices asked for, one process each: `0,1` or `cpu,cpu`; none: the default one."""
        names = (name.strip().lower().removeprefix("cuda:") for name in self.device.split(","))
        return tuple(name for name in names if name)

    def check_split(self, processes: int) -> None:
        """Raise UsageError, naming the nearest batch that works, where so many processes cannot share the batch evenly."""
        if self.batch_size == AUTO_BATCH:
            raise UsageError(
                f"--batch-size {AUTO_BATCH}: is measured on one device; give the batch of all {processes} processes together"
            )
        if self.batch_size % processes:
            nearest = max(round(self.batch_size / processes), 1) * processes
            raise UsageError(
                f"--batch-size {self.batch_size}: cannot be split evenly over {processes} processes; "
                f"the nearest that can is --batch-size {nearest}"
            )

    @property
    def run_project(self) -> str:
        """The project asked for, or the default of a training or of a search."""
        return self.project or (DEFAULT_SEARCH_PROJECT if self.evolve else DEFAULT_PROJECT)

    @property
    def run_name(self) -> str:
        """The name asked for, or `exp`."""
        return self.name or DEFAULT_NAME

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as `opt.yaml` and checkpoints hold them."""
        values = asdict(self)
        values["freeze"] = list(self.freeze)
        return values

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any]) -> TrainConfig:
        """Build from `as_dict()`'s values, as a checkpoint holds them."""
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in mapping.items() if key in known}
        values["freeze"] = tuple(values.get("freeze", (0,)))
        return cls(**values)
