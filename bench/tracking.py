#!/usr/bin/env python3
"""The cost of tracking for a training step: all trackers healthy, slow (30 s per answer) or dead, against no tracking.

    python bench/tracking.py [--rounds 16] [--steps 200] [--slice 10] [--threads 1] [--img 128] [--json]

Real steps of a small model on this machine. A round is one epoch of every condition, cut into slices. The conditions
take turns in a random order, so that other load on the machine affects all alike. Bridges run during the slices of
their own condition and are frozen otherwise. The end of an epoch (its events, results.csv, the check of the bridges) is
part of its last slice; the work of the bridges after it falls into the first slices of the next epoch.

`healthy` is MLflow's embedded database, TensorBoard, and ClearML on the tests' double of its server in a separate
process. `slow` and `dead` are MLflow and ClearML on servers that take 30 s per answer, or refuse. `off again` is a
second condition without tracking: its difference is the noise of this run.

The main figure is the sum of the seconds of all epochs divided by that of `off`, with a 95 % interval from a
bootstrap over the rounds. The clock of a frozen bridge goes on, so that each slice begins with a look at the log, and
samples of the machine are more frequent than in a training: the figures are too high rather than too low. Also
printed: the trainer's processor seconds, those of each bridge per epoch (in epochs without freezing), and the time to
start the bridges.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from common import REPOSITORY, Step, machine, made_up_targets
from tracking_conditions import Condition, opened_conditions

from starling.core.units import format_duration
from starling.device import select_compute
from starling.progress import Progress

BARS = {"healthy": 1.01, "slow": 1.05, "dead": 1.05}
"""Maximum ratios."""
START_BAR_S = 0.05
EPOCHS_ALONE = 3
"""Number of epochs without freezing, to measure the bridges themselves."""


def made_step(options: argparse.Namespace) -> Callable[[], None]:
    """Return what runs one iteration, warmed up."""
    compute = select_compute("cpu", "off")
    torch.set_num_threads(options.threads)
    step = Step(str(REPOSITORY / "tests" / "tiny.yaml"), options.img, 8, compute).prepare()
    images, targets = torch.rand(8, 3, options.img, options.img), made_up_targets(8)
    for _ in range(20):
        step(images, targets)
    return lambda: step(images, targets)


def train(
    options: argparse.Namespace, conditions: Sequence[Condition], step: Callable[[], None]
) -> np.ndarray:
    """Run all rounds, and return the seconds [round, condition, 2]: wall-clock, and of the trainer's processor."""
    for condition in conditions:
        condition.epoch_ended()  # so that the bridges have an epoch to send in each round
    seconds = np.zeros((options.rounds, len(conditions), 2))
    order, progress, started = random.Random(0), Progress(sys.stderr), time.monotonic()
    laps = options.steps // options.slice
    alone = EPOCHS_ALONE * laps * sum(condition.is_tracked for condition in conditions)  # measured afterwards
    for lap in range(options.rounds * laps):
        number, in_epoch = divmod(lap, laps)
        for index in order.sample(range(len(conditions)), len(conditions)):
            with conditions[index].turn():
                began = _clocks()
                for _ in range(options.slice):
                    step()
                if in_epoch == laps - 1:
                    conditions[index].epoch_ended()
                seconds[number, index] += _clocks() - began
        a_slice = (time.monotonic() - started) / ((lap + 1) * len(conditions))
        left = a_slice * ((options.rounds * laps - lap - 1) * len(conditions) + alone)
        progress.show(lambda: f"round {number + 1} of {options.rounds}, {format_duration(left)} left")  # noqa: B023
    return seconds


def bridges_seconds(
    options: argparse.Namespace, condition: Condition, step: Callable[[], None]
) -> dict[str, float]:
    """Return the mean processor seconds of each bridge per epoch, over successive epochs without freezing."""
    if not condition.is_tracked:
        return {}
    with condition.turn():
        before = condition.processor_s()
        for _ in range(EPOCHS_ALONE):
            for _ in range(options.steps):
                step()
            condition.epoch_ended()
        after = condition.processor_s()
    return {tracker: (after[tracker] - before[tracker]) / EPOCHS_ALONE for tracker in before}


def _clocks() -> np.ndarray:
    return np.array((time.perf_counter(), time.process_time()))


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ratio of the seconds of one condition to those of `off`."""

    of_sums: float
    low: float
    high: float
    """`low` and `high` are the ends of the 95 % interval, from a bootstrap over the rounds."""
    median: float
    """Median of the ratios of single rounds."""

    @classmethod
    def of(cls, mine: np.ndarray, off: np.ndarray) -> Ratio:
        """Compare the seconds of each round, both [rounds]."""
        rounds = len(off)
        drawn = np.random.default_rng(0).integers(rounds, size=(10_000, rounds))
        low, high = np.percentile(mine[drawn].sum(1) / off[drawn].sum(1), (2.5, 97.5))
        return cls(float(mine.sum() / off.sum()), float(low), float(high), float(np.median(mine / off)))

    def __str__(self) -> str:
        return f"{self.of_sums:.3f} (95 %: {self.low:.3f} to {self.high:.3f}; median {self.median:.3f})"


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of one condition against `off`."""

    condition: str
    wall: Ratio
    processor: Ratio
    """Ratio of the trainer's processor seconds, which other load on the machine hardly affects."""
    epoch_s: float
    """Mean seconds of an epoch."""
    bridges_s: Mapping[str, float]
    """Tracker -> processor seconds of its bridge per epoch."""
    starting_s: float
    """Seconds to start the bridges."""

    @property
    def holds(self) -> bool:
        """Whether the ratios are below the bars; the control condition has no bar."""
        return self.wall.of_sums <= BARS.get(self.condition, math.inf) and self.starting_s <= START_BAR_S

    def verdict(self) -> str:
        """Return whether the bar of the step is reached, if the interval decides it."""
        bar = BARS.get(self.condition)
        if bar is None:
            return "the noise of this run"
        decided = "reached" if self.wall.high <= bar else "missed" if self.wall.low > bar else "not decided"
        return f"bar {bar} {decided}"


def measure(options: argparse.Namespace, folder: Path) -> list[Figures]:
    """Return the figures of every condition but `off`."""
    step = made_step(options)
    with opened_conditions(folder) as conditions:
        seconds = train(options, conditions, step)
        bridges = {condition.name: bridges_seconds(options, condition, step) for condition in conditions}
        for condition in conditions:  # otherwise the trackers may have done nothing
            condition.settle()
    return [
        Figures(
            condition.name,
            *(Ratio.of(seconds[:, index, clock], seconds[:, 0, clock]) for clock in (0, 1)),
            float(seconds[:, index, 0].mean()),
            bridges[condition.name],
            condition.starting_s,
        )
        for index, condition in enumerate(conditions)
        if condition.name != "off"
    ]


def show(found: Figures) -> None:
    """Print the figures of one condition."""
    print(f"{found.condition:9} {found.wall} of off: {found.verdict()}; processor {found.processor}")
    if found.bridges_s:
        each = ", ".join(f"{name} {taken * 1000:.0f} ms" for name, taken in found.bridges_s.items())
        share = sum(found.bridges_s.values()) / found.epoch_s
        print(f"{'':9} its bridges start in {found.starting_s * 1000:.0f} ms, and take processor time in an epoch of "
              f"{found.epoch_s:.1f} s: {each} ({share:.1%})")  # fmt: skip


def main() -> int:
    """Measure, print, and return 1 if a bar is missed."""
    # An interrupted run must also end its bridges, which are stopped most of the time.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=16, help="epochs of each condition")
    parser.add_argument("--steps", type=int, default=200, help="steps of an epoch")
    parser.add_argument("--slice", type=int, default=10, help="steps of a turn")
    parser.add_argument("--threads", type=int, default=1, help="of the trainer; bridges run on other cores")
    parser.add_argument("--img", type=int, default=128, help="pixels of a side")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.rounds < 1 or not 1 <= options.slice <= options.steps or options.steps % options.slice:
        parser.error(
            "an epoch is a whole number of slices: --steps a multiple of --slice, --rounds at least 1"
        )
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "CLEARML_"))]:
        del os.environ[name]  # the user's own servers
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, Path(folder))
    if options.json:
        print(json.dumps([asdict(found) for found in figures]))
    else:
        print(f"{machine()}, {options.threads} used; load {load:.1f} before")
        for found in figures:
            show(found)
    return 0 if all(found.holds for found in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
