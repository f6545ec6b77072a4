#!/usr/bin/env python3
"""What tracking costs a training step: all trackers on, healthy, slow (30 s an answer) or dead, against tracking off.

    python bench/tracking.py [--rounds 9] [--epochs 3] [--steps 40] [--img 128]

Real steps of a small model on this machine, an epoch's events after every --steps of them, as the trainer appends them.
The conditions take turns within each round, in another order each time; the bridges of the others are frozen meanwhile.
`healthy` is MLflow's embedded database and TensorBoard, `slow` and `dead` are MLflow behind a server that takes 30 s an
answer, or refuses. A round's ratio is its seconds by those of `off`; the median of the rounds counts. The second figure
is the processor seconds of the trainer alone, which other work on the machine has no part in.
Also: how long the trainer takes to start its bridges, in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from common import REPOSITORY, Step, machine, made_up_targets

from app.engine.device import select_compute
from app.engine.progress import Silence
from app.engine.reporter import Reporter, RunLabel
from app.engine.results import EpochRow, write_results
from app.outputs.run_dir import RunDir
from app.tracking.events import EventLog
from app.tracking.process import Bridges, start_bridges

BARS = {"healthy": 1.01, "slow": 1.05, "dead": 1.05}
"""The ratios to reach."""
START_BAR_S = 0.05
SLOW_S = 30
SLOW_SERVER = f"""
import contextlib, http.server, time
class Slow(http.server.BaseHTTPRequestHandler):
    def answer(self):
        time.sleep({SLOW_S})
        with contextlib.suppress(OSError):
            self.send_error(503)
    do_GET = do_POST = do_PATCH = do_PUT = answer
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
print(server.server_port, flush=True)
server.serve_forever()
"""


@dataclass(frozen=True, slots=True)
class Figures:
    """One condition against `off`."""

    condition: str
    ratio: float
    """Median over the rounds of its seconds by those of `off`."""
    fastest: float
    """Its fastest round by the fastest of `off`: what a machine that others use as well can tell."""
    processor_ratio: float
    """The same of the trainer's own processor seconds."""
    spread: tuple[float, float]
    """Lowest and highest ratio of a round."""
    starting_s: float
    """To start the bridges."""


class Condition:
    """One run with its event log and bridges; frozen while it is not its turn."""

    def __init__(self, name: str, folder: Path, variables: dict[str, str]) -> None:
        self.name = name
        self.run = RunDir(folder / name)
        self.run.path.mkdir(parents=True)
        self.rows: list[EpochRow] = []
        self._bridges: Bridges | None = None
        log = None
        self.starting_s = 0.0
        if name != "off":
            log = EventLog(self.run.events, name, warn=lambda line: None)
            os.environ.update(variables)
            began = time.perf_counter()
            self._bridges = start_bridges(log, warn=lambda line: None)
            self.starting_s = time.perf_counter() - began
            for variable in variables:
                del os.environ[variable]
        self._reporter = Reporter(
            RunLabel(name, "bench", name), self.run.path, progress=Silence(), events=log
        )
        self._reporter.started({"epochs": 100}, {})

    def epoch_ended(self, epochs: int) -> None:
        """Do what the trainer does at the end of an epoch."""
        n = len(self.rows)
        self.rows.append(
            EpochRow(n, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6, 0.7), (0.1, 0.2, 0.3), (0.1, 0.01, 0.01))
        )
        write_results(self.run.results_csv, self.rows)
        self._reporter.epoch_ended(self.rows[-1], epochs, 8, best=False)
        if self._bridges is not None:
            self._bridges.check()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Let the bridges run while the block does."""
        self.signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.signal(signal.SIGSTOP)

    def signal(self, signum: int) -> None:
        """Send a signal to the bridges that still run."""
        for handle in self._bridges.handles if self._bridges else ():
            if handle.process.poll() is None:
                handle.process.send_signal(signum)

    def delivered(self) -> bool:
        """Return whether the first bridge has sent everything, so that its start is behind it."""
        try:
            cursor = json.loads(self.run.events.with_name("events.mlflow.cursor").read_bytes())
        except (OSError, ValueError):
            return False
        return bool(cursor["problem"]) or cursor["offset"] == self.run.events.stat().st_size


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(options: argparse.Namespace, folder: Path) -> list[Figures]:
    """Return the figures of every condition."""
    slow = subprocess.Popen([sys.executable, "-c", SLOW_SERVER], stdout=subprocess.PIPE, text=True)
    assert slow.stdout is not None
    servers = {"slow": int(slow.stdout.readline()), "dead": free_port()}
    variables = {name: {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"} for name, port in servers.items()}
    conditions = [Condition(name, folder, variables.get(name, {})) for name in ("off", *BARS)]
    try:
        for condition in conditions[1:]:  # one after the other: the imports are not what is measured
            deadline = time.monotonic() + 120
            while not condition.delivered() and time.monotonic() < deadline:
                time.sleep(0.2)
            condition.signal(signal.SIGSTOP)
        seconds = _rounds(options, conditions)
    finally:
        slow.kill()
        for condition in conditions:
            condition.signal(signal.SIGKILL)
    return [_compare(condition, seconds[condition.name], seconds["off"]) for condition in conditions[1:]]


def _compare(
    condition: Condition, mine: list[tuple[float, float]], off: list[tuple[float, float]]
) -> Figures:
    """Return a condition's figures out of (wall, processor) seconds of each round."""
    ratios = [with_it[0] / without[0] for with_it, without in zip(mine, off, strict=True)]
    return Figures(
        condition.name,
        statistics.median(ratios),
        min(wall for wall, _ in mine) / min(wall for wall, _ in off),
        statistics.median(with_it[1] / without[1] for with_it, without in zip(mine, off, strict=True)),
        (min(ratios), max(ratios)),
        condition.starting_s,
    )


def _rounds(options: argparse.Namespace, conditions: list[Condition]) -> dict[str, list[tuple[float, float]]]:
    """Return (wall, processor) seconds of each condition's part of each round."""
    import torch

    side, compute = options.img, select_compute("cpu", "off", lambda line: None)
    run = Step(str(REPOSITORY / "tests" / "tiny.yaml"), side, 8, compute).prepare()
    images, targets = torch.rand(8, 3, side, side), made_up_targets(8)
    for _ in range(10):
        run(images, targets)
    seconds: dict[str, list[tuple[float, float]]] = {condition.name: [] for condition in conditions}
    order = random.Random(0)
    for _ in range(options.rounds):
        for condition in order.sample(conditions, len(conditions)):
            with condition.turn():
                began, processor = time.perf_counter(), time.process_time()
                for _ in range(options.epochs):
                    for _ in range(options.steps):
                        run(images, targets)
                    condition.epoch_ended(options.epochs * options.rounds)
                seconds[condition.name].append((time.perf_counter() - began, time.process_time() - processor))
    return seconds


def main() -> int:
    """Measure, print, and return 1 where a bar is missed."""
    # So that a run that is cut short also ends its bridges, which are stopped most of the time.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--epochs", type=int, default=3, help="epochs of a condition's part of a round")
    parser.add_argument("--steps", type=int, default=40, help="steps of an epoch")
    parser.add_argument("--img", type=int, default=128, help="pixels of a side")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["STARLING_RUNS"] = folder
        figures = measure(options, Path(folder))
    if options.json:
        print(json.dumps([asdict(found) for found in figures]))
    else:
        print(machine())
        for found in figures:
            low, high = found.spread
            print(f"{found.condition:8} {found.ratio:.3f} of off (rounds {low:.3f} to {high:.3f}; bar {BARS[found.condition]}); fastest {found.fastest:.3f}, "
                  f"processor {found.processor_ratio:.3f}; bridges started in {found.starting_s * 1000:.0f} ms")  # fmt: skip
    missed = [
        found for found in figures if found.ratio > BARS[found.condition] or found.starting_s > START_BAR_S
    ]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
