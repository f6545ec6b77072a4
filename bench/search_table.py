#!/usr/bin/env python3
"""Train a small detector many times, and record the fitness of each epoch: the table for bench/search_efficiency.py.

    python bench/search_table.py --data ../bccd/bccd.yaml [--out bench/search_table.csv] [--processes 2]

Rows are appended as they finish; a restart continues with the missing rows. There are five kinds of candidates:

- `wide`: some genes drawn anywhere within their limits, so that the table contains bad candidates;
- `near`: every gene changed a little, as in a step of evolution;
- `uniform`: every gene drawn anywhere within its limits, as in a random search;
- `guided`: proposed by TPE from all rows so far, so that the table covers the neighbourhood of good candidates;
- `again`: the best of these with other seeds, which shows how much of a fitness is luck.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common import Loop

REPOSITORY = Path(__file__).resolve().parent.parent
COUNTS = {"wide": 80, "near": 66, "uniform": 16, "guided": 72, "again": 36}
LAYOUT = REPOSITORY / "bench" / "search_table.yaml"
AGAIN_OF_BEST = 18
"""Number of candidates that are trained with other seeds."""
WIDE_SHARE, NEAR_SPREAD = 0.3, 0.35
"""Share of the genes that a wide draw changes; standard deviation of the logarithm of a near draw's factor."""


def main() -> int:
    """Fill the table, in several processes of one thread each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="YAML of the whole BCCD")
    parser.add_argument(
        "--weights", type=Path, default=Path("base.pt"), help="what rows start from; made first if absent"
    )
    parser.add_argument("--out", type=Path, default=REPOSITORY / "bench" / "search_table.csv")
    parser.add_argument("--img", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--most", type=int, default=sum(COUNTS.values()), help="rows in all")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part is not None:
        return _fill(args)
    if not args.weights.is_file():
        make_base(args.weights.absolute())
    command = [sys.executable, *sys.argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    parts = [
        subprocess.Popen([*command, "--part", str(part)], env=environment) for part in range(args.processes)
    ]
    return max(part.wait() for part in parts)


def make_base(weights: Path) -> None:
    """Train the initial weights of all rows, in place of published weights: on the small set, for a minute."""
    runs = weights.parent
    command = [sys.executable, "app/train.py", "--data", "datasets/bccd-mini/bccd.yaml", "--weights", "", "--cfg",
               str(LAYOUT), "--img", "128", "--epochs", "60", "--batch", "16", "--device", "cpu", "--noplots", "--noval",
               "--nosave", "--name", "base", "--exist-ok"]  # fmt: skip
    environment = {**os.environ, "STARLING_RUNS": str(runs), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
    (runs / "train" / "base" / "weights" / "best.pt").rename(weights)


@dataclasses.dataclass(frozen=True)
class Job:
    """One training: a row of the table."""

    index: int
    kind: str
    seed: int
    genes: dict[str, float]


def _fill(args: argparse.Namespace) -> int:
    # Imported here, because torch reads the number of threads when it is loaded.
    sys.path.insert(0, str(REPOSITORY / "bench"))
    from common import Loop

    from starling.core.settings.train import TrainConfig
    from starling.search.space_file import read_space

    config = TrainConfig(
        data=args.data, weights=str(args.weights), imgsz=args.img, epochs=args.epochs, batch_size=args.batch, workers=1,
        device="cpu", noplots=True, nosave=True, patience=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(config, Path(folder))
        seed_hyp = {key: float(value) for key, value in loop.hyp.as_dict().items() if value is not None}
        for job in _jobs(args, read_space(TrainConfig(evolve=1))[0].starting_from(seed_hyp).genes, seed_hyp):
            began = time.monotonic()
            curve = _train(loop, Path(folder), job, {**seed_hyp, **job.genes})
            _append(args, job, curve, time.monotonic() - began)
    return 0


def _train(loop: Loop, folder: Path, job: Job, hyp: dict[str, float]) -> list[float]:
    """Return the fitness after each epoch; shorter if the training diverged."""
    from starling.config.hyp import Hyp
    from starling.outputs.run_dir import RunDir
    from starling.progress import Silence
    from starling.stop_signal import StopSignal
    from starling.training.reporting.reporter import Reporter, RunLabel
    from starling.training.trainer import Diverged
    from starling.training.training import train_in

    run = RunDir(folder / f"{job.index}")
    run.weights.mkdir(parents=True)
    silent = Reporter(RunLabel("", "", "run"), run.path, progress=Silence())
    curve: list[float] = []
    with StopSignal() as stop, contextlib.suppress(Diverged):
        train_in(
            loop.setup, dataclasses.replace(loop.config, seed=job.seed), Hyp.from_mapping(hyp, f"row {job.index}"),
            run, silent, stop, on_epoch=lambda row: curve.append(row.fitness), recover=False,
        )  # fmt: skip
    return curve


def _jobs(args: argparse.Namespace, genes: Sequence, seed_hyp: dict[str, float]) -> Iterator[Job]:
    """Yield this process's share of the missing rows; later kinds use the existing rows."""
    index = 0
    for kind, count in COUNTS.items():
        for place in range(count):
            mine = index % args.processes == args.part and index < args.most
            if mine and index not in {int(row["index"]) for row in read_table(args.out)}:
                yield _job(args, index, kind, place, genes, seed_hyp)
            index += 1


def _job(
    args: argparse.Namespace, index: int, kind: str, place: int, genes: Sequence, seed_hyp: dict[str, float]
) -> Job:
    import numpy as np

    random = np.random.default_rng([index, 5])
    values = {gene.name: seed_hyp[gene.name] for gene in genes}
    if index == 0:
        return Job(index, "seed", 0, values)
    if kind in ("uniform", "wide"):
        for gene in genes:
            if kind == "uniform" or random.random() < WIDE_SHARE:
                logarithmic = gene.name in LOGARITHMIC
                low, high = np.log([gene.lower, gene.upper]) if logarithmic else (gene.lower, gene.upper)
                drawn = random.uniform(low, high)
                values[gene.name] = gene.clamp(float(np.exp(drawn) if logarithmic else drawn))
        return Job(index, kind, 0, values)
    if kind == "near":
        for gene in genes:
            factor = float(np.exp(random.normal(0, NEAR_SPREAD * min(gene.gain, 1))))
            start = values[gene.name]
            # A factor does not change a gene with value 0.
            values[gene.name] = gene.clamp(
                start * factor if start else abs(random.normal(0, 0.05)) * gene.upper
            )
        return Job(index, kind, 0, values)
    rows = read_table(args.out)
    if kind == "guided":
        return Job(index, kind, 0, _guided(rows, genes, index))
    best = sorted((row for row in rows if row["kind"] != "again"), key=_final, reverse=True)[:AGAIN_OF_BEST]
    parent = best[place % len(best)]
    return Job(
        index,
        kind,
        1 + place // AGAIN_OF_BEST,
        {gene.name: float(parent[gene.name]) for gene in genes},
    )


LOGARITHMIC = ("lr0", "lrf")


def _guided(rows: Sequence[dict[str, str]], genes: Sequence, index: int) -> dict[str, float]:
    import optuna

    space = {
        gene.name: optuna.distributions.FloatDistribution(
            gene.lower, gene.upper, log=gene.name in LOGARITHMIC
        )
        for gene in genes
    }
    sampler = optuna.samplers.TPESampler(seed=index, multivariate=True, n_startup_trials=1)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for row in rows:
        params = {gene.name: gene.clamp(float(row[gene.name])) for gene in genes}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=space, value=max(_final(row), 0.0))
        )
    proposed = study.ask(space).params
    return {gene.name: gene.clamp(proposed[gene.name]) for gene in genes}


def _final(row: dict[str, str]) -> float:
    """Return the fitness after the last epoch; below all others if the training diverged."""
    last = list(row.values())[-1]
    return float(last) if last else -1.0


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows so far."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _append(args: argparse.Namespace, job: Job, curve: Sequence[float], seconds: float) -> None:
    """Append a row, one process at a time."""
    from starling.core.lock import try_flock, wait_for

    columns = ["index", "kind", "seed", "seconds", *job.genes, *(f"epoch{n + 1}" for n in range(args.epochs))]
    cells = [f"{value:.5f}" for value in curve] + [""] * (args.epochs - len(curve))
    with args.out.open("a", newline="") as file:
        wait_for(lambda: try_flock(file.fileno()))
        writer = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            writer.writerow(columns)
        writer.writerow(
            [
                job.index,
                job.kind,
                job.seed,
                f"{seconds:.1f}",
                *(f"{value:.5g}" for value in job.genes.values()),
                *cells,
            ]
        )
    print(
        f"row {job.index} {job.kind}: {curve[-1] if curve else float('nan'):.4f} in {seconds:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
