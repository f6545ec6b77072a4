"""The command line of `train.py`: the classic names, their aliases and any unambiguous prefix."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn

from app.config.train_config import CACHES, OPTIMIZERS, TrainConfig
from app.errors import UsageError, suggest

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


class Flag:
    """One flag; its type, default and place come from the field of TrainConfig that its first name means."""

    def __init__(self, *names: str, help: str, **options: Any) -> None:
        self.names, self.help, self.options = names, help, options
        self.field = names[0].lstrip("-").replace("-", "_")

    def add_to(self, group: argparse._ArgumentGroup, default: Any) -> None:
        """Add the flag to a group of the parser."""
        options: dict[str, Any] = {"dest": self.field, "help": self.help, "default": default}
        if isinstance(default, bool):
            options["action"] = "store_true"
        elif isinstance(default, int | float):
            options["type"] = type(default)
        group.add_argument(*self.names, **{**options, **self.options})


FLAGS: dict[str, tuple[Flag, ...]] = {
    "what to train": (
        Flag("--weights", help="weights to start from; '' trains from scratch [%(default)s]"),
        Flag("--cfg", help="layout YAML: yolov5n.yaml to yolov5x.yaml, or a path [the weights' own]"),
        Flag("--data", help="dataset YAML, shipped name or path [%(default)s]"),
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
        Flag("--batch-size", "--batch", help="images in one iteration [%(default)s]"),
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
        Flag("--seed", help="[%(default)s]"),
        Flag("--device", help="cpu, or a GPU's number [the first GPU, else cpu]"),
        Flag(
            "--amp",
            choices=("auto", "on", "off"),
            help="bfloat16 autocast [%(default)s: where the hardware has it]",
        ),
        Flag("--workers", help="most loader threads [%(default)s, at most one a core]"),
        Flag(
            "--cache",
            nargs="?",
            const="ram",
            choices=CACHES,
            help="keep decoded images: ram, disk (one file shared by all containers), off "
            "[auto: ram if they fit; bare: ram]",
        ),
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
    ),
    "where results go": (
        Flag("--project", help="folder below runs/ [train; evolve for a search]"),
        Flag("--name", help="run folder below the project [exp, exp2, …]"),
        Flag("--exist-ok", help="write into an existing run folder"),
        Flag("--nosave", help="keep the final checkpoint only"),
        Flag("--noval", help="validate after the final epoch only"),
        Flag("--noplots", help="draw no pictures"),
        Flag("--save-period", metavar="N", help="keep a checkpoint every N epochs [no]"),
        Flag(
            "--save-minutes",
            metavar="N",
            help="save after so many minutes within an epoch too; 0: after each step [%(default)s]",
        ),
        Flag("--debug", help="show tracebacks"),
    ),
}
"""The flags by the heading that --help shows them under."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `train.py`."""
    parser = _Parser(
        prog="train.py",
        description="Train a detector, or search its hyperparameters together with every other worker.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = TrainConfig()
    for heading, flags in FLAGS.items():
        group = parser.add_argument_group(heading)
        for flag in flags:
            flag.add_to(group, getattr(default, flag.field))
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
        "save_minutes",
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
