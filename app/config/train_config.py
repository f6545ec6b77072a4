"""What one `train.py` command asks for: parsed once, checked, frozen."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NoReturn, get_args

from app.errors import ConfigError, UsageError, suggest
from app.outputs.run_dir import check_name

OPTIMIZERS = ("SGD", "Adam", "AdamW")
Cache = Literal["auto", "ram", "disk", "off"]
CACHES: tuple[Cache, ...] = get_args(Cache)

DEFAULT_PROJECT = "runs/train"
DEFAULT_SEARCH_PROJECT = "runs/evolve"
DEFAULT_NAME = "exp"

EXAMPLES = """\
examples:
  from scratch, on the pictures this project carries
      python train.py --img 320 --batch 16 --epochs 3 --data bccd.yaml --weights '' --cfg yolov5n.yaml
  fine-tuning from a checkpoint
      python train.py --data my/data.yaml --weights best.pt --hyp hyp.finetune.yaml
  going on after an interruption
      python train.py --resume runs/train/exp/weights/last.pt
  searching hyperparameters: 60 trainings shared by every worker that names the same project and name
      python train.py --data my/data.yaml --weights '' --cfg yolov5n.yaml --epochs 10 --project blood --name search --evolve 60
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training, or one worker of a search. Field by field the flags of `train.py`."""

    weights: str = "yolov5s.pt"
    """Weights to start from; empty: from scratch."""
    cfg: str = ""
    """Layout YAML; empty: the one the weights carry."""
    data: str = "coco128.yaml"
    """Dataset YAML."""
    hyp: str = "hyp.scratch-low.yaml"
    """Hyperparameter YAML."""
    epochs: int = 100
    """Epochs in all, those before a resume counted."""
    batch_size: int = 16
    """Images in one iteration over all devices."""
    imgsz: int = 640
    """Training image side in pixels; rounded up to the layout's largest stride."""
    resume: str = ""
    """Checkpoint to go on from, or `latest`."""
    nosave: bool = False
    """Keep the final checkpoint only."""
    noval: bool = False
    """Validate after the final epoch only."""
    noplots: bool = False
    """Draw no pictures."""
    evolve: int = 0
    """Finished trainings in the whole search; 0: train once."""
    cache: Cache = "auto"
    """Where decoded images are kept: auto, ram, disk, off."""
    device: str = ""
    """`cpu`, `0`, or empty: the first GPU if there is one."""
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
    seed: int = 0
    """Seed of everything random."""
    amp: str = "auto"
    """bfloat16 autocast: auto (where the hardware has it), on, off."""
    strict: bool = False
    """Stop at the first unusable picture or label instead of leaving it out."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self) -> None:
        """Check every value that can be checked without touching a file."""
        if self.epochs < 1:
            raise ConfigError("--epochs", self.epochs, "must be at least 1")
        if self.batch_size < 1:
            raise ConfigError(
                "--batch-size",
                self.batch_size,
                "must be at least 1; automatic batch (-1) is not available yet",
            )
        if self.imgsz < 32:
            raise ConfigError("--imgsz", self.imgsz, "must be at least 32 pixels")
        if self.evolve < 0:
            raise ConfigError("--evolve", self.evolve, "must be at least 1")
        if self.workers < 0:
            raise ConfigError("--workers", self.workers, "must be 0 or more")
        if self.patience < 0:
            raise ConfigError("--patience", self.patience, "must be 0 (off) or more")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError("--label-smoothing", self.label_smoothing, "must be from 0 to below 1")
        if any(layer < 0 for layer in self.freeze):
            raise ConfigError("--freeze", self.freeze, "layers count from 0")
        if self.device.count(","):
            raise UsageError(
                f"--device {self.device}: one training on several devices is not available yet; "
                "give one, or search on all of them with `launcher up --gpus`"
            )
        if self.name:
            check_name(self.name)

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


NOT_YET = frozenset(
    {
        "--rect",
        "--quad",
        "--multi-scale",
        "--image-weights",
        "--sync-bn",
        "--bucket",
        "--noautoanchor",
        "--local_rank",
    }
)
"""Flags of the classic trainer that are refused, by name, until they do what they say."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ours: one message, with the flag that may have been meant."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError in place of printing the usage and exiting."""
        flag = next((word.split("=", 1)[0] for word in message.split() if word.startswith("--")), "")
        if flag in NOT_YET and "unrecognized" in message:
            raise UsageError(
                f"{flag} is not available yet; leave it out (docs/coming-from-yolov5.md lists these)"
            )
        hint = suggest(flag, self._option_string_actions) if "unrecognized" in message else ""
        raise UsageError(f"{message}{hint}; see train.py --help")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `train.py`: the classic names, their aliases and any unambiguous prefix."""
    default = TrainConfig()
    parser = _Parser(
        prog="train.py",
        description="Train a detector, or search its hyperparameters together with every other worker.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_argument_group("what to train")
    model.add_argument(
        "--weights",
        default=default.weights,
        help="weights to start from; '' trains from scratch [%(default)s]",
    )
    model.add_argument(
        "--cfg",
        default=default.cfg,
        help="layout YAML: yolov5n.yaml to yolov5x.yaml, or a path [the weights' own]",
    )
    model.add_argument(
        "--data", default=default.data, help="dataset YAML, shipped name or path [%(default)s]"
    )
    model.add_argument(
        "--hyp", default=default.hyp, help="hyperparameter YAML, shipped name or path [%(default)s]"
    )
    model.add_argument("--single-cls", action="store_true", help="treat every class as one")
    model.add_argument(
        "--freeze",
        nargs="+",
        type=int,
        default=list(default.freeze),
        metavar="N",
        help="one number: freeze the first N layers (10 = backbone); several: those layers [0]",
    )

    length = parser.add_argument_group("how long, how large")
    length.add_argument("--epochs", type=int, default=default.epochs, help="epochs in all [%(default)s]")
    length.add_argument(
        "--batch-size",
        "--batch",
        dest="batch_size",
        type=int,
        default=default.batch_size,
        help="images in one iteration [%(default)s]",
    )
    length.add_argument(
        "--imgsz",
        "--img",
        "--img-size",
        dest="imgsz",
        type=int,
        default=default.imgsz,
        metavar="PIXELS",
        help="image side, rounded up to the stride [%(default)s]",
    )
    length.add_argument(
        "--patience",
        type=int,
        default=default.patience,
        help="epochs without improvement before stopping; 0: never [%(default)s]",
    )
    length.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        default=default.resume,
        metavar="LAST.PT",
        help="go on from this checkpoint; without a path, from the newest last.pt; in a search: join it",
    )

    how = parser.add_argument_group("how to train")
    how.add_argument("--optimizer", choices=OPTIMIZERS, default=default.optimizer, help="[%(default)s]")
    how.add_argument("--cos-lr", action="store_true", help="cosine learning rate in place of linear")
    how.add_argument(
        "--label-smoothing", type=float, default=default.label_smoothing, metavar="EPS", help="[%(default)s]"
    )
    how.add_argument("--seed", type=int, default=default.seed, help="[%(default)s]")
    how.add_argument(
        "--device", default=default.device, help="cpu, or a GPU's number [the first GPU, else cpu]"
    )
    how.add_argument(
        "--amp",
        choices=("auto", "on", "off"),
        default=default.amp,
        help="bfloat16 autocast [%(default)s: where the hardware has it]",
    )
    how.add_argument(
        "--workers",
        type=int,
        default=default.workers,
        help="most loader threads [%(default)s, at most one a core]",
    )
    how.add_argument(
        "--cache",
        nargs="?",
        const="ram",
        choices=CACHES,
        default=default.cache,
        help="keep decoded images: ram, disk (one file shared by all containers), off [auto: ram if they fit; bare: ram]",
    )
    how.add_argument("--strict", action="store_true", help="stop at the first unusable picture or label")

    search = parser.add_argument_group("searching hyperparameters")
    search.add_argument(
        "--evolve",
        nargs="?",
        type=int,
        const=300,
        default=default.evolve,
        metavar="N",
        help="search until the study has N finished trainings, over all workers [bare: 300]",
    )

    output = parser.add_argument_group("where results go")
    output.add_argument(
        "--project", default=default.project, help="folder below runs/ [train; evolve for a search]"
    )
    output.add_argument("--name", default=default.name, help="run folder below the project [exp, exp2, …]")
    output.add_argument("--exist-ok", action="store_true", help="write into an existing run folder")
    output.add_argument("--nosave", action="store_true", help="keep the final checkpoint only")
    output.add_argument("--noval", action="store_true", help="validate after the final epoch only")
    output.add_argument("--noplots", action="store_true", help="draw no pictures")
    output.add_argument(
        "--save-period",
        type=int,
        default=default.save_period,
        metavar="N",
        help="keep a checkpoint every N epochs [no]",
    )
    output.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


RESUMABLE = frozenset(
    {
        "epochs",
        "patience",
        "device",
        "workers",
        "cache",
        "noplots",
        "nosave",
        "save_period",
        "exist_ok",
        "resume",
        "debug",
    }
)
"""Flags that a resume may change; any other would make it a different training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainCommand:
    """A parsed command line: the configuration, and which of its fields were given."""

    config: TrainConfig
    given: frozenset[str]

    def resumed(self, saved: TrainConfig) -> TrainConfig:
        """Return the configuration of a resume: the saved one, with what was given now.

        Raises UsageError for a flag that would change what is being trained.
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
    """Return what the command line asks for; raises UsageError for what cannot work."""
    unset = object()
    parser = build_parser()
    names = [field.name for field in fields(TrainConfig)]
    values = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset))))
    given = {key: value for key, value in values.items() if value is not unset}
    if "freeze" in given:
        given["freeze"] = tuple(given["freeze"])
    return TrainCommand(config=TrainConfig(**given), given=frozenset(given))
