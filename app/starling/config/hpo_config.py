"""What one `hpo.py` command asks for: parsed once, checked, frozen; and its command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starling.config.flags import CommandParser, Flag
from starling.errors import ConfigError

SAMPLERS = ("optuna", "random")

EXAMPLES = """\
examples:
  20 trials here, one after the other, from the newest finished training that ClearML knows
      python hpo.py
  from a task of your choice, four at a time on whatever agents serve the queue, for a night at most
      python hpo.py --task 0123456789abcdef0123456789abcdef --queue gpus --parallel 4 --trials 60 --hours 10

Without ClearML, and faster on the GPUs of one machine: python train.py --evolve (docs/search.md).
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class HpoConfig:
    """One search over clones of a ClearML task. Field by field the flags of `hpo.py`."""

    task: str = ""
    """Task that trials are clones of; empty: the newest finished training of ours."""
    queue: str = ""
    """Queue whose agents run the trials; empty: they run here."""
    parallel: int = 1
    """Trials in the queue at once."""
    trials: int = 20
    """Trials in all, failed ones counted."""
    hours: float = 24.0
    """Hours in all."""
    trial_hours: float = 0.0
    """Hours of one trial, its time in the queue counted; 0: as many as the search has."""
    failures: int = 3
    """Failed trials after which the search ends."""
    sampler: str = "optuna"
    """How trials are proposed: optuna (TPE) or random."""
    space: str = "classic.yaml"
    """What is changed, and how far: a space YAML."""
    objective: str = "metrics/mAP_0.5:0.95"
    """The scalar whose highest value counts."""
    epochs: int = 0
    """Epochs of a trial; 0: as many as the task has."""
    seed: int = 0
    """Seed of what is proposed."""
    name: str = "hpo"
    """Name of the search's own task."""
    json: bool = False
    """End with one JSON object."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self) -> None:
        """Check every value that can be checked without asking a server."""
        for flag, value in (
            ("--trials", self.trials),
            ("--parallel", self.parallel),
            ("--failures", self.failures),
        ):
            if value < 1:
                raise ConfigError(flag, value, "must be at least 1")
        if not self.hours > 0:
            raise ConfigError("--hours", self.hours, "must be above 0: a search ends in any case")
        if not self.trial_hours >= 0:
            raise ConfigError("--trial-hours", self.trial_hours, "must be 0 (all of --hours) or more")
        if self.epochs < 0:
            raise ConfigError("--epochs", self.epochs, "must be 0 (the task's own) or more")
        if self.parallel > 1 and not self.queue:
            raise ConfigError(
                "--parallel", self.parallel, "needs agents: add --queue NAME; here, use train.py --evolve"
            )
        if "/" not in self.objective:
            raise ConfigError("--objective", self.objective, "must be title/series, as metrics/mAP_0.5")


FLAGS: dict[str, tuple[Flag, ...]] = {
    "what to search": (
        Flag(
            "--task",
            metavar="ID",
            help="ClearML task that trials are clones of [the newest finished training]",
        ),
        Flag("--space", help="YAML of what is searched and how far, shipped name or path [%(default)s]"),
        Flag(
            "--objective", metavar="TITLE/SERIES", help="the scalar whose highest value counts [%(default)s]"
        ),
        Flag("--epochs", help="epochs of a trial [the task's]"),
        Flag("--sampler", choices=SAMPLERS, help="TPE, or at random [%(default)s]"),
        Flag("--seed", help="[%(default)s]"),
    ),
    "where": (
        Flag("--queue", help="queue whose agents run the trials [they run here]"),
        Flag("--parallel", metavar="N", help="trials in the queue at once [%(default)s]"),
    ),
    "when it ends": (
        Flag("--trials", metavar="N", help="trials in all, failed ones counted [%(default)s]"),
        Flag("--hours", metavar="H", help="hours in all; what then still runs is stopped [%(default)s]"),
        Flag(
            "--trial-hours",
            metavar="H",
            help="hours of one trial, in the queue too; 0: all of --hours [%(default)s]",
        ),
        Flag("--failures", metavar="N", help="failed trials after which it ends [%(default)s]"),
    ),
    "how it is told": (
        Flag("--name", help="name of the search's own task [%(default)s]"),
        Flag("--json", help="end with one JSON object"),
        Flag("--debug", help="show tracebacks"),
    ),
}
"""The flags by the heading that --help shows them under."""


def build_parser() -> CommandParser:
    """Return the parser of `hpo.py`."""
    return CommandParser.of(
        "hpo.py",
        "Search hyperparameters over clones of a ClearML task, here or on agents.",
        EXAMPLES,
        FLAGS,
        HpoConfig(),
    )


def parse_args(argv: Sequence[str] | None = None) -> HpoConfig:
    """Return what the command line asks for; raises UsageError for what cannot work."""
    return HpoConfig(**build_parser().parse_given(argv, HpoConfig))
