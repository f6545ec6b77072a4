"""The configuration of a `train.py` command: parsed once, checked, frozen."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from starling.core.errors import ConfigError, UsageError
from starling.core.settings.declaration import Check, Config, at_least, setting, settings_of
from starling.core.settings.parser import Command
from starling.core.settings.study_url import parse_study_url
from starling.core.settings.values import check_bucket, check_name

Optimizer = Literal["SGD", "Adam", "AdamW"]
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
Cache = Literal["auto", "ram", "disk", "device", "val", "off"]
CACHES: tuple[Cache, ...] = get_args(Cache)
Sampler = Literal["fast", "classic", "random", "qmc", "gp"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
DEFAULT_SAMPLER: Sampler = "fast"
"""The sampler with the best result for the same number of images; see "Which sampler" in docs/performance.md."""

AUTO_BATCH = -1
AUTO_FINALISTS = -1
AUTO_INTERVAL = -1
BARE_EVOLVE = 300

DEFAULT_PROJECT = "runs/train"
DEFAULT_SEARCH_PROJECT = "runs/evolve"
DEFAULT_NAME = "exp"

_SEARCHING = "searching hyperparameters"
"""The heading of the settings that need `--evolve`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Config):
    """One training, or one worker of a search."""

    weights: str = setting(
        "yolov5s.pt",
        "weights to start from: a path with or without .pt, or published ones by name; '': from scratch, with --cfg",
        heading="what to train",
    )
    cfg: str = setting(
        "",
        "layout YAML: yolov5n.yaml and its like (docs/train.md), or a path",
        shown="the weights' own",
    )
    data: str = setting("coco128.yaml", "dataset YAML, shipped name or path, or clearml://ID", resumable=True)
    download: bool = setting(
        False, "fetch the dataset first, as its description says, unless it exists", resumable=True
    )
    hyp: str = setting(
        "hyp.scratch-low.yaml",
        "hyperparameter YAML, shipped name or path; missing values keep their defaults",
    )
    single_cls: bool = setting(False, "treat every class as one")
    freeze: tuple[int, ...] = setting(
        (0,),
        "one number: freeze the first N layers (10 = backbone); several: those layers",
        metavar="N",
        check=Check(holds=lambda layers: all(layer >= 0 for layer in layers), problem="layers count from 0"),
    )

    epochs: int = setting(
        100,
        "epochs in all, those before a resume counted; more of them go on with a finished run",
        heading="duration and size",
        check=at_least(1),
        resumable=True,
    )
    batch_size: int = setting(
        16,
        "images in one iteration over all devices; -1: as many as the GPU has room for, 16 on the CPU",
        "--batch-size",
        "--batch",
        check=at_least(1, "must be at least 1, or -1 to fill the GPU", besides=(AUTO_BATCH,)),
    )
    imgsz: int = setting(
        640,
        "image side, rounded up to the stride",
        "--imgsz",
        "--img",
        "--img-size",
        metavar="PIXELS",
        check=at_least(32, "must be at least 32 pixels"),
    )
    patience: int = setting(
        100,
        "epochs without a better fitness before training stops; 0: never",
        check=at_least(0, "must be 0 (off) or more"),
        resumable=True,
    )
    resume: str = setting(
        "",
        "go on from this checkpoint or run folder; without a path, from the newest last.pt; in a search: join it",
        metavar="LAST.PT",
        shown="",
        bare="latest",
        resumable=True,
    )

    optimizer: Optimizer = setting("SGD", "SGD with Nesterov momentum, Adam or AdamW", heading="how to train")
    cos_lr: bool = setting(False, "cosine learning rate in place of linear")
    label_smoothing: float = setting(
        0.0,
        "epsilon of label smoothing: class targets become 1 - EPS/2 and EPS/2",
        metavar="EPS",
        check=Check(holds=lambda epsilon: 0 <= epsilon < 1, problem="must be from 0 to below 1"),
    )
    close_mosaic: int = setting(0, "show no mosaics in the last N epochs", metavar="N", check=at_least(0))
    rect: bool = setting(False, "batches of like aspect, each in its smallest shape, and no mosaics")
    multi_scale: bool = setting(
        False, "another image size each iteration, 0.5 to 1.5 of --imgsz in whole strides"
    )
    quad: bool = setting(
        False,
        "a quarter of the images at twice the side: one image enlarged, or four joined; the batch is a multiple of 4",
    )
    image_weights: bool = setting(False, "show images of rare and badly found classes more often")
    seed: int = setting(0, "seed of everything random")
    device: str = setting(
        "",
        "cpu, or a GPU's number; 0,1: one training on both, one process per GPU",
        shown="the first GPU, else cpu",
        resumable=True,
    )
    sync_bn: bool = setting(False, "BatchNorm over the images of all GPUs of a training; GPUs only")
    local_rank: int = setting(
        -1, "accepted and ignored: torchrun sets it in a variable", "--local_rank", metavar="N", shown=""
    )
    amp: Literal["auto", "on", "off"] = setting(
        "auto",
        "bfloat16 autocast: auto (if the hardware supports it, CPUs too), on, off; never float16",
    )
    compile: bool = setting(
        False,
        "compile the model first (minutes), replayed as a CUDA graph on GPUs, for faster iterations; needs g++",
        resumable=True,
    )
    deterministic: bool = setting(False, "GPU kernels that give the same numbers in every run, if they exist")
    workers: int = setting(
        8,
        "most loader threads: at most one per core, and one if the model runs on the CPU",
        check=at_least(0, "must be 0 or more"),
        resumable=True,
    )
    cache: Cache = setting(
        "auto",
        "keep decoded images: auto (disk, else ram), disk (one file shared by all containers), ram, "
        "device (GPU memory), val (ram, validation only), off",
        shown="auto; bare: ram",
        bare="ram",
        resumable=True,
    )
    noautoanchor: bool = setting(
        False, "keep the anchors of layout or weights, even if they do not fit the labels"
    )
    strict: bool = setting(
        False, "stop at the first unusable image or label; else they are left out, counted and named"
    )

    evolve: int = setting(
        0,
        "search until the study has N finished trainings, over all workers",
        heading=_SEARCHING,
        metavar="N",
        shown=f"off; bare: {BARE_EVOLVE}",
        bare=BARE_EVOLVE,
        check=at_least(0, "must be at least 1"),
    )
    sampler: Sampler = setting(
        DEFAULT_SAMPLER,
        "how candidates are proposed: fast, classic (the evolution step), random, qmc or gp; docs/search.md says "
        "when to take which",
    )
    space: str = setting("classic.yaml", "YAML of the search space, shipped name or path")
    prune: bool = setting(False, "end trainings that fall behind early; N is then what the search may cost")
    finalists: int = setting(
        AUTO_FINALISTS,
        "train the best K candidates again, on two fresh seeds each, before one is named; within N",
        metavar="K",
        shown="3 with --prune, else 0",
        check=Check(
            holds=lambda count: count in (AUTO_FINALISTS, 0) or count >= 2,
            problem="must be 0 (none) or at least 2, or there is no choice",
        ),
    )
    study: str = setting(
        "",
        "keep the study in a database, for workers of many hosts: postgresql://user@host[:port]/database, "
        "the password elsewhere (docs/search.md)",
        metavar="URL",
        shown="a journal in the search's folder",
    )
    allow_nfs: bool = setting(
        False,
        "keep the journal on a network file system: only if all workers run on this host, or its locks work across hosts",
    )

    remote: str = setting(
        "",
        "put the command into this ClearML queue for an agent to run, and leave",
        heading="where it runs",
        metavar="QUEUE",
        shown="run here",
    )

    project: str = setting(
        "",
        "folder below runs/; an absolute path is used unchanged",
        heading="where results go",
        shown="train; evolve for a search",
    )
    name: str = setting("", "run folder below the project", shown="exp, exp2, …")
    exist_ok: bool = setting(False, "write into an existing run folder", resumable=True)
    nosave: bool = setting(
        False, "write last.pt only at the end or on a stop; best.pt as usual", resumable=True
    )
    noval: bool = setting(False, "validate after the final epoch only")
    noplots: bool = setting(False, "draw no plots", resumable=True)
    bbox_interval: int = setting(
        AUTO_INTERVAL,
        "draw the detections of the validation every N epochs, into epochs/; 0: never",
        "--bbox_interval",
        "--bbox-interval",
        metavar="N",
        shown="a tenth of all",
        check=at_least(AUTO_INTERVAL, "must be at least 1, 0 (none) or -1 (auto)"),
        resumable=True,
    )
    hooks: str = setting(
        "",
        "Python file whose functions are called as training goes: docs/track.md",
        metavar="FILE.PY",
        shown="$STARLING_HOOKS",
        resumable=True,
    )
    save_period: int = setting(
        -1, "keep weights/epochN.pt every N epochs; below 1: no", metavar="N", shown="no", resumable=True
    )
    save_minutes: float = setting(
        10.0,
        "also save every N minutes within an epoch; 0: after each step",
        metavar="N",
        check=at_least(0, "must be 0 (after each step) or more"),
        resumable=True,
    )
    json: bool = setting(
        False,
        "end with one JSON object: precision, recall, mAP50, mAP50_95 and more",
        resumable=True,
    )
    bucket: str = setting(
        "",
        "copy results to PROJECT/NAME below this address at the end: gs://, s3://, az://",
        metavar="URL",
        shown="no",
        resumable=True,
    )
    debug: bool = setting(False, "show tracebacks", resumable=True)

    def check_together(self) -> None:
        """Raise UsageError for values that exclude each other; servers are checked later."""
        if self.quad and self.batch_size % 4:
            raise ConfigError("--batch-size", self.batch_size, "must be a multiple of 4 with --quad")
        self._check_search()
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
        """Raise UsageError for an invalid study, and for settings of a search without --evolve."""
        if self.study:
            parse_study_url(self.study)
        if self.study and self.allow_nfs:
            raise UsageError("--allow-nfs: is about the journal, and --study names a database; leave one out")
        for declared in settings_of(type(self)):
            given = getattr(self, declared.field) != declared.default
            if declared.heading == _SEARCHING and given and not self.evolve:
                raise UsageError(f"{declared.flag}: belongs to a search; add --evolve N, or leave it out")

    def _check_devices(self) -> None:
        """Raise UsageError for an invalid list of devices; whether they exist is checked later."""
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
        """The devices from --device, one process each: `0,1` or `cpu,cpu`; empty: the default device."""
        names = (name.strip().lower().removeprefix("cuda:") for name in self.device.split(","))
        return tuple(name for name in names if name)

    def check_split(self, processes: int) -> None:
        """Raise UsageError with the nearest batch that works if the batch cannot be split evenly."""
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
        """The value of --project, or the default for a training or a search."""
        return self.project or (DEFAULT_SEARCH_PROJECT if self.evolve else DEFAULT_PROJECT)

    @property
    def run_name(self) -> str:
        """The value of --name, or `exp`."""
        return self.name or DEFAULT_NAME

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for `opt.yaml` and checkpoints."""
        values = asdict(self)
        values["freeze"] = list(self.freeze)
        return values

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any]) -> TrainConfig:
        """Build a configuration from the values of `as_dict()` in a checkpoint; unknown keys are ignored."""
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in mapping.items() if key in known}
        values["freeze"] = tuple(values.get("freeze", (0,)))
        return cls(**values)


COMMAND = Command(
    name="train",
    description="Train a detector, or search its hyperparameters together with every other worker.",
    config=TrainConfig,
    examples="""\
  from scratch, on the images this project carries
      python train.py --img 320 --batch 16 --epochs 3 --data bccd.yaml --weights '' --cfg yolov5n.yaml
  fine-tuning from a checkpoint
      python train.py --data my/data.yaml --weights best.pt --hyp hyp.finetune.yaml
  going on after an interruption
      python train.py --resume runs/train/exp/weights/last.pt
  searching hyperparameters: 60 trainings shared by every worker that names the same project and name
      python train.py --data my/data.yaml --weights '' --cfg yolov5n.yaml --epochs 10 --project blood --name search --evolve 60
""",
)
RESUMABLE = frozenset(declared.field for declared in COMMAND.settings if declared.resumable)
"""Fields that a resume may change without making it another training. A changed `data` must hold the same images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainCommand:
    """A parsed command line: the configuration, and the names of the given fields."""

    config: TrainConfig
    given: frozenset[str]
    arguments: tuple[str, ...] = ()
    """The words of the command line."""
    goes_on: bool = False
    """Whether the command resumes the unfinished run of its replica, without a --resume in the words."""

    def resumed(self, saved: TrainConfig) -> TrainConfig:
        """Return the configuration of a resume: the saved one, changed by the given fields.

        Raises UsageError for a flag that would change the training.
        """
        changed = {key: getattr(self.config, key) for key in self.given}
        for key in sorted(changed.keys() - RESUMABLE):
            if changed[key] != getattr(saved, key):
                raise UsageError(
                    f"--{key.replace('_', '-')} {changed[key]}: the run to resume has {getattr(saved, key)!r}; "
                    "leave the flag out, or start a new run from its weights with --weights"
                )
        return replace(saved, **changed)


def parse_args(argv: Sequence[str] | None = None) -> TrainCommand:
    """Return the configuration from the command line; raises UsageError for invalid values."""
    arguments = tuple(sys.argv[1:] if argv is None else argv)
    given = COMMAND.given(arguments)
    given.pop("local_rank", None)
    return TrainCommand(config=TrainConfig(**given), given=frozenset(given), arguments=arguments)
