"""The configuration of an `hpo.py` command: parsed once, checked, frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from starling.core.errors import ConfigError
from starling.core.settings.declaration import Check, Config, at_least, setting
from starling.core.settings.parser import Command


@dataclass(frozen=True, kw_only=True, slots=True)
class HpoConfig(Config):
    """One search over clones of a ClearML task."""

    task: str = setting(
        "",
        "ClearML task that trials are clones of",
        heading="what to search",
        metavar="ID",
        shown="the newest finished training that is no trial itself",
    )
    space: str = setting("classic.yaml", "YAML of the search space, shipped name or path")
    objective: str = setting(
        "metrics/mAP_0.5:0.95",
        "the scalar to maximise",
        metavar="TITLE/SERIES",
        check=Check(holds=lambda name: "/" in name, problem="must be title/series, as metrics/mAP_0.5"),
    )
    epochs: int = setting(
        0, "epochs of a trial", shown="the task's", check=at_least(0, "must be 0 (the task's own) or more")
    )
    sampler: Literal["optuna", "random"] = setting(
        "optuna", "how trials are proposed: optuna (by TPE) or random"
    )
    seed: int = setting(0, "seed of the proposals")
    queue: str = setting(
        "",
        "queue whose agents run the trials",
        heading="where trials run",
        shown="they run here, one after the other",
    )
    parallel: int = setting(1, "trials in the queue at once", metavar="N", check=at_least(1))
    trials: int = setting(
        20, "trials in all, failed ones counted", heading="when it ends", metavar="N", check=at_least(1)
    )
    hours: float = setting(
        24.0,
        "hours in all; trials that still run then are stopped",
        metavar="H",
        check=Check(holds=lambda hours: hours > 0, problem="must be above 0: a search ends in any case"),
    )
    trial_hours: float = setting(
        0.0,
        "hours of one trial, in the queue too; 0: all of --hours",
        metavar="H",
        check=at_least(0, "must be 0 (all of --hours) or more"),
    )
    failures: int = setting(3, "failed trials after which the search ends", metavar="N", check=at_least(1))
    name: str = setting("hpo", "name of the search's own task", heading="output")
    json: bool = setting(False, "end with one JSON object")
    debug: bool = setting(False, "show tracebacks")

    def check_together(self) -> None:
        """Raise UsageError for values that exclude each other."""
        if self.parallel > 1 and not self.queue:
            raise ConfigError(
                "--parallel", self.parallel, "needs agents: add --queue NAME; here, use train.py --evolve"
            )


COMMAND = Command(
    name="hpo",
    description="Search hyperparameters over clones of a ClearML task, here or on agents.",
    config=HpoConfig,
    examples="""\
  20 trials here, one after the other, from the newest finished training that ClearML knows
      python hpo.py
  from a task of your choice, four at a time on whatever agents serve the queue, for a night at most
      python hpo.py --task 0123456789abcdef0123456789abcdef --queue gpus --parallel 4 --trials 60 --hours 10

Without ClearML, and faster on the GPUs of one machine: python train.py --evolve (docs/search.md).
""",
)


def parse_args(argv: Sequence[str] | None = None) -> HpoConfig:
    """Return the configuration from the command line; raises UsageError for invalid values."""
    return HpoConfig(**COMMAND.given(argv))
