"""Report on the demo: print progress and the remaining time until its fleet has ended, then the search's result.

    python scripts/demo_report.py watch   --launcher COMMAND --fleet demo/search --budget 6
    python scripts/demo_report.py summary --search runs/demo/search

Standard library only, because a host with Docker does not have the trainer's packages.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL_S = 2.0
SAY_EVERY_S = 15.0
ENDED = {"exited", "dead", "created"}
METRIC_COLUMNS = 7
"""The number of columns of evolve.csv before the hyperparameters."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of the fleet from `launcher status --json`."""

    replicas: Sequence[Mapping[str, Any]]

    @property
    def live(self) -> bool:
        """Whether any replica still runs."""
        return any(replica["phase"] not in ENDED for replica in self.replicas)

    @property
    def failed(self) -> list[str]:
        """The failed replicas, with the launcher's message."""
        return [
            f"{replica['replica']}: {replica['state']}"
            for replica in self.replicas
            if replica["phase"] in ENDED and replica["exit_code"] != 0
        ]

    @property
    def finished(self) -> int:
        """The number of finished trainings of the search, from the most advanced report of a replica."""
        return max((replica["finished"] or 0 for replica in self.replicas), default=0)

    @property
    def work_done(self) -> float:
        """The number of finished trainings; a running training counts as the fraction of its finished epochs."""
        under_way = [
            (replica["epoch"] - 1) / replica["epochs"]
            for replica in self.replicas
            if replica["trainer_phase"] in ("training", "validating")
            and replica["epoch"]
            and replica["epochs"]
        ]
        return float(self.finished + sum(under_way))

    def line(self, elapsed_s: float, budget: int) -> str:
        """Return one line: finished trainings, best fitness, each replica's activity, remaining time."""
        known = [replica["best_fitness"] for replica in self.replicas if replica["best_fitness"] is not None]
        best = f"best fitness {max(known):.4f}" if known else "no fitness yet"
        doing = []
        for replica in self.replicas:
            epoch = f" epoch {replica['epoch']}/{replica['epochs']}" if replica["epoch"] is not None else ""
            candidate = f" candidate {replica['candidate']}" if replica["candidate"] else ""
            words = (replica["trainer_phase"] or "starting") + candidate + epoch
            doing.append(words if replica["phase"] not in ENDED else replica["state"])
        left = time_left_s(self.work_done, budget, elapsed_s)
        left_words = "time left: not known yet" if left is None else f"about {left:.0f} s left"
        return (
            f"   [{elapsed_s:4.0f} s] {self.finished}/{budget} trainings done, {best}; "
            f"{'; '.join(doing)}; {left_words}"
        )


def time_left_s(work_done: float, budget: int, elapsed_s: float) -> float | None:
    """Return the remaining seconds at the current pace, start-up included; None before any work is done."""
    if work_done <= 0:
        return None
    return max(budget - work_done, 0) * elapsed_s / work_done


def read_progress(launcher: str, fleet: str) -> Progress:
    """Return the launcher's status; raises RuntimeError with its message if it fails."""
    answer = subprocess.run(
        [launcher, "status", "--json", fleet], capture_output=True, text=True, check=False
    )
    try:
        return Progress(json.loads(answer.stdout)["replicas"])
    except (ValueError, KeyError):
        raise RuntimeError(answer.stderr.strip() or "launcher status printed nothing") from None


def watch(launcher: str, fleet: str, budget: int, limit_s: float) -> int:
    """Print progress until every replica has ended; return 0 if all succeeded, else 1."""
    began = said = time.monotonic()
    before = -1
    while True:
        progress = read_progress(launcher, fleet)
        now = time.monotonic()
        if progress.finished != before or now - said >= SAY_EVERY_S:
            print(progress.line(now - began, budget), flush=True)
            before, said = progress.finished, now
        if not progress.live:
            break
        if now - began > limit_s:
            print(f"not done after {limit_s:.0f} s; given up", file=sys.stderr)
            return 1
        time.sleep(POLL_S)
    if not progress.replicas:
        print(f"{fleet}: the launcher knows no such fleet", file=sys.stderr)
        return 1
    for words in progress.failed:
        print(words, file=sys.stderr)
    return 1 if progress.failed else 0


def fitness(row: Mapping[str, str]) -> float:
    """Return a row's fitness: a tenth of mAP at IoU 0.5, nine tenths of mAP averaged over IoU 0.5 to 0.95."""
    return 0.1 * float(row["metrics/mAP_0.5"]) + 0.9 * float(row["metrics/mAP_0.5:0.95"])


def summarise(search: Path) -> str:
    """Return the result of the search from its evolve.csv: fitness before and after, and the best hyperparameters.

    "Before" is the seed, the given hyperparameters, in the first row. Raises OSError without the file.
    """
    with open(search / "evolve.csv", newline="") as file:
        rows = [{name.strip(): value.strip() for name, value in row.items()} for row in csv.DictReader(file)]
    seed, best = rows[0], max(rows, key=fitness)
    gain = fitness(best) - fitness(seed)
    names = list(seed)[METRIC_COLUMNS:]
    lines = [
        f"best hyperparameters of {len(rows)} trainings (training {rows.index(best) + 1}; * changed by the search):"
    ]
    for name in names:
        changed = "*" if best[name] != seed[name] else " "
        lines.append(f"  {changed} {name:<16} {float(best[name]):<12.6g} seed {float(seed[name]):.6g}")
    lines.append(f"fitness before (seed) {fitness(seed):.5f}, after (best) {fitness(best):.5f}: {gain:+.5f}")
    return "\n".join(lines)


def main() -> int:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    watching = commands.add_parser("watch")
    watching.add_argument(
        "--launcher", required=True, help="the command, which finds engine and runs in STARLING_*"
    )
    watching.add_argument("--fleet", required=True)
    watching.add_argument("--budget", type=int, required=True)
    watching.add_argument("--limit", type=float, default=1800.0, help="seconds until giving up")
    summary = commands.add_parser("summary")
    summary.add_argument("--search", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "summary":
        print(summarise(options.search))
        return 0
    try:
        return watch(options.launcher, options.fleet, options.budget, options.limit)
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 5


if __name__ == "__main__":
    sys.exit(main())
