"""The command line of `train.py`: the classic names, their aliases and any unambiguous prefix."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from starling.config.flags import CommandParser, Flag
from starling.config.train_config import CACHES, OPTIMIZERS, SAMPLERS, TrainConfig
from starling.errors import UsageError

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


FLAGS: dict[str, tuple[Flag, ...]] = {
    "what to train": (
        Flag("--weights", help="weights to start from; '' trains from scratch [%(default)s]"),
        Flag(
            "--cfg",
            help="layout YAML: yolov5n.yaml and its like (docs/train.md), or a path [the weights' own]",
        ),
        Flag("--data", help="dataset YAML, shipped name or path, or clearml://ID [%(default)s]"),
        Flag("--download", help="fetch the dataset first, as its description says, unless it is there"),
        Flag("--hyp", help="hyperparameter YAML, shipped name or path [%(default)s]"),
        Flag("--single-cls", help="treat every class as one"),
        Flag(
            "--freeze",
            nargs="+",
            type=int,
            metavar="N",
            help="one number: freeze the first N layers (10 = backbone); several: those layers [0]",
        ),
    ),
    "how long, how large": (
        Flag("--epochs", help="epochs in all [%(default)s]"),
        Flag(
            "--batch-size",
            "--batch",
            help="images in one iteration; -1: as many as the GPU has room for [%(default)s]",
        ),
        Flag(
            "--imgsz",
            "--img",
            "--img-size",
            metavar="PIXELS",
            help="image side, rounded up to the stride [%(default)s]",
        ),
        Flag("--patience", help="epochs without improvement before stopping; 0: never [%(default)s]"),
        Flag(
            "--resume",
            nargs="?",
            const="latest",
            metavar="LAST.PT",
            help="go on from this checkpoint; without a path, from the newest last.pt; in a search: join it",
        ),
    ),
    "how to train": (
        Flag("--optimizer", choices=OPTIMIZERS, help="[%(default)s]"),
        Flag("--cos-lr", help="cosine learning rate in place of linear"),
        Flag("--label-smoothing", metavar="EPS", help="[%(default)s]"),
        Flag("--rect", help="batches of like aspect in their own shapes, no mosaics"),
        Flag("--multi-scale", help="another image size each iteration, 0.5 to 1.5 of --imgsz"),
        Flag("--quad", help="a quarter of the images at twice the side: one picture enlarged, or four"),
        Flag("--image-weights", help="show rare and badly found classes more often"),
        Flag("--seed", help="[%(default)s]"),
        Flag("--device", help="cpu, or a GPU's number; 0,1: one training on both [the first GPU, else cpu]"),
        Flag("--sync-bn", help="BatchNorm over the pictures of all GPUs of one training"),
        Flag("--local_rank", metavar="N", help="ignored; torchrun says it by a variable"),
        Flag(
            "--amp",
            choices=("auto", "on", "off"),
            help="bfloat16 autocast [%(default)s: where the hardware has it]",
        ),
        Flag("--compile", help="compile the model first (minutes), for faster iterations; needs g++"),
        Flag(
            "--deterministic",
            help="GPU kernels that give the same numbers in every run, where there are some",
        ),
        Flag("--workers", help="most loader threads [%(default)s, at most one a core]"),
        Flag(
            "--cache",
            nargs="?",
            const="ram",
            choices=CACHES,
            help="keep decoded images: disk (one file shared by all containers), ram, device (GPU memory), val (ram, "
            "validation only), off [auto: disk, else ram; bare: ram]",
        ),
        Flag("--noautoanchor", help="keep the anchors, even where they do not fit the labels"),
        Flag("--strict", help="stop at the first unusable picture or label"),
    ),
    "searching hyperparameters": (
        Flag(
            "--evolve",
            nargs="?",
            const=300,
            metavar="N",
            help="search until the study has N finished trainings, over all workers [bare: 300]",
        ),
        Flag(
            "--sampler",
            choices=SAMPLERS,
            help="how candidates are proposed: docs/search.md says when to take which [%(default)s]",
        ),
        Flag("--space", help="YAML of what is searched and how far, shipped name or path [%(default)s]"),
        Flag("--prune", help="end trainings that fall behind early; N is then what the search may cost"),
        Flag(
            "--finalists",
            metavar="K",
            help="train the best K candidates again on fresh seeds before one is named, within N [with --prune 3, else 0]",
        ),
        Flag(
            "--study",
            metavar="URL",
            help="keep the study in a database, for workers of many hosts: postgresql://user@host[:port]/database, "
            "the password elsewhere (docs/search.md) [a journal in the search's folder]",
        ),
        Flag(
            "--allow-nfs",
            help="keep the journal on a network file system: all workers run on this host, or its locks hold",
        ),
    ),
    "where it runs": (
        Flag(
            "--remote",
            metavar="QUEUE",
            help="put it into this ClearML queue for an agent to run, and leave [run here]",
        ),
    ),
    "where results go": (
        Flag("--project", help="folder below runs/ [train; evolve for a search]"),
        Flag("--name", help="run folder below the project [exp, exp2, …]"),
        Flag("--exist-ok", help="write into an existing run folder"),
        Flag("--nosave", help="keep the final checkpoint only"),
        Flag("--noval", help="validate after the final epoch only"),
        Flag("--noplots", help="draw no pictures"),
        Flag(
            "--bbox_interval",
            "--bbox-interval",
            metavar="N",
            help="draw what the validation finds every N epochs; 0: never [a tenth of all]",
        ),
        Flag(
            "--hooks",
            metavar="FILE.PY",
            help="functions to call as training goes: docs/track.md [$STARLING_HOOKS]",
        ),
        Flag("--save-period", metavar="N", help="keep a checkpoint every N epochs [no]"),
        Flag(
            "--save-minutes",
            metavar="N",
            help="save after so many minutes within an epoch too; 0: after each step [%(default)s]",
        ),
        Flag("--json", help="end with one JSON object: precision, recall, mAP50, mAP50_95 and more"),
        Flag("--bucket", metavar="URL", help="copy results there at the end: gs://, s3://, az:// [no]"),
        Flag("--debug", help="show tracebacks"),
    ),
}
"""The flags by the heading that --help shows them under."""


def build_parser() -> CommandParser:
    """Return the parser of `train.py`."""
    return CommandParser.of(
        "train.py",
        "Train a detector, or search its hyperparameters together with every other worker.",
        EXAMPLES,
        FLAGS,
        TrainConfig(),
    )


RESUMABLE = frozenset(
    {
        "epochs",
        "patience",
        "device",
        "workers",
        "cache",
        "compile",
        "noplots",
        "bbox_interval",
        "hooks",
        "nosave",
        "save_period",
        "save_minutes",
        "exist_ok",
        "resume",
        "data",
        "download",
        "bucket",
        "debug",
        "json",
    }
)
"""Flags that a resume may change; any other would make it a different training. Other `data` must hold the same images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainCommand:
    """A parsed command line: the configuration, and which of its fields were given."""

    config: TrainConfig
    given: frozenset[str]
    arguments: tuple[str, ...] = ()
    """The words it was parsed from."""
    goes_on: bool = False
    """Whether it resumes the run that its replica left, which the words do not say."""

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
    arguments = tuple(sys.argv[1:] if argv is None else argv)
    given = build_parser().parse_given(arguments, TrainConfig)
    given.pop("local_rank", None)
    return TrainCommand(config=TrainConfig(**given), given=frozenset(given), arguments=arguments)
