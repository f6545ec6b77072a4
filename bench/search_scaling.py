#!/usr/bin/env python3
"""How a search scales: the throughput of its workers, and the cost of a study with many candidates.

    python bench/search_scaling.py                      # 1, 2, 4 and 8 workers; a training is a sleep of 2 s
    python bench/search_scaling.py --real               # 1 and 2 workers that train, with one thread each
    python bench/search_scaling.py --journal 10000      # open, ask and tell in a journal with 10,000 candidates

Workers are processes that run the product's own `Worker` on one study. Their start-up (imports, data) is not counted:
they begin together when all are ready, and the time runs until the last result is recorded. All other parts
of a search are included: locks, journal, leases, evolve.csv, hyp_evolve.yaml, evolve.png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from common import REPOSITORY, machine, runs_below

from starling.config.hyp import Hyp

PROCESSES = multiprocessing.get_context("spawn")
SEED_HYP = Hyp().as_dict()

Span = tuple[float, float]
"""Begin and end of a training, by the monotonic clock that all processes of a machine share."""


@dataclass(frozen=True)
class Throughput:
    """The throughput of some workers together."""

    workers: int
    trainings: int
    seconds: float
    """Seconds from the common start to the last result."""
    outside: float
    """Share of the workers' time outside of trainings, up to the last result of each."""
    training_s: float
    """Mean seconds of a training."""

    @property
    def rate(self) -> float:
        """Trainings per second."""
        return self.trainings / self.seconds


def measure(workers: int, trainings: int, work: Callable[..., None], *given: Any) -> Throughput:
    """Let worker processes share `trainings`; each runs `work(folder, budget, place, barrier, *given)`."""
    barrier = PROCESSES.Barrier(workers)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            PROCESSES.Process(target=work, args=(Path(folder), trainings, place, barrier, *given))
            for place in range(workers)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            if process.exitcode != 0:
                sys.exit(f"a worker ended with exit code {process.exitcode}")
        told = [json.loads(path.read_text()) for path in Path(folder).glob("worker-*.json")]
    began = min(worker["began"] for worker in told)
    trained = sum(end - start for worker in told for start, end in worker["spans"])
    busy = sum(worker["ended"] - began for worker in told if worker["spans"])
    done = sum(len(worker["spans"]) for worker in told)
    assert done == trainings, f"{done} trainings in place of {trainings}"
    return Throughput(
        workers, done, max(worker["ended"] for worker in told) - began, 1 - trained / busy, trained / done
    )


def tell(folder: Path, began: float, spans: list[Span], ended: float) -> None:
    """Write the times of one worker to a file for `measure`."""
    content = json.dumps({"began": began, "spans": spans, "ended": ended})
    (folder / f"worker-{os.getpid()}.json").write_text(content)


def sleeping_worker(folder: Path, budget: int, place: int, barrier: Barrier, seconds: float) -> None:
    """Work on candidates whose training is a sleep."""
    from starling.search.outcome import Candidate, Outcome, Report
    from starling.search.study import SearchStudy
    from starling.search.worker import CandidateTrainer, Worker

    spans: list[Span] = []
    recorded = [0.0]

    class Sleeper(CandidateTrainer):
        def train(self, candidate: Candidate, report: Report) -> Outcome:
            begun = time.monotonic()
            time.sleep(seconds)
            report()
            spans.append((begun, time.monotonic()))
            return outcome(1 - abs(candidate.hyp["lr0"] - 0.02))

        def ended(self, candidate: Candidate) -> None:
            recorded[0] = time.monotonic()

    barrier.wait()
    began = time.monotonic()
    study = SearchStudy.open_or_create(folder / "search", search_spec(budget))
    Worker(study, Sleeper()).run()
    tell(folder, began, spans, recorded[0])


def training_worker(
    folder: Path, budget: int, place: int, barrier: Barrier, args: argparse.Namespace
) -> None:
    """Train for real, with one thread; the time runs from the first batch of the last worker to start."""
    # During its setup on one core, the product takes one thread; later the kernel chooses the core of that thread.
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[place % len(cores)]})
    from starling import settings
    from starling.core.settings.train import TrainConfig
    from starling.search.training import search
    from starling.search.yolo import YoloTrainer
    from starling.training.trainer import Trainer, TrainResult

    spans: list[Span] = []
    ended = [0.0]
    fit, whole = Trainer.fit, YoloTrainer.ended

    def timed(self: Trainer) -> TrainResult:
        if not spans:
            os.sched_setaffinity(0, cores)
            barrier.wait()
        begun = time.monotonic()
        result = fit(self)
        spans.append((begun, time.monotonic()))
        return result

    def note(self: YoloTrainer, candidate: Any) -> None:
        whole(self, candidate)
        ended[0] = time.monotonic()

    Trainer.fit = timed  # type: ignore[method-assign]
    YoloTrainer.ended = note  # type: ignore[method-assign]
    with runs_below(folder), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        settings.update({"mlflow": False, "tensorboard": False})
        search(
            TrainConfig(
                data=args.data, weights="", cfg=args.cfg, imgsz=args.img, epochs=args.epochs, evolve=budget,
                device="cpu", project="bench", name="scaling",
            )
        )  # fmt: skip
    tell(folder, spans[0][0], spans, ended[0])


def fill(study: Any, count: int) -> None:
    """Append finished candidates to a study, as copies of the records of its first candidate with other values."""
    from starling.search.storage.journal import JOURNAL, SafeJournalBackend
    from starling.search.study import LeasedCandidate

    first = study.ask("bench")
    assert isinstance(first, LeasedCandidate)
    before = (study.directory / JOURNAL).read_text().count("\n") - 1
    study.finish(first, outcome(0.5))
    lines = (study.directory / JOURNAL).read_text().splitlines()[before:]
    rng = random.Random(0)
    records: list[dict[str, Any]] = []
    for number in range(1, count):
        for record in map(json.loads, lines):
            if "params" in record:
                drawn = {
                    name: round(value * rng.uniform(0.5, 1), 5) for name, value in record["params"].items()
                }
                record |= {"params": drawn, "user_attrs": {**record["user_attrs"], "root": number}}
            else:
                record["trial_id"] = number
            if record.get("values"):
                record["values"] = [rng.random()]
            records.append(record)
    SafeJournalBackend(study.directory / JOURNAL).append_logs(records)


def search_spec(budget: int) -> Any:
    """Return what the workers search: the classic space, starting from the shipped hyp."""
    from starling.core.settings.train import TrainConfig
    from starling.search.space_file import read_space
    from starling.search.spec import StudySpec

    return StudySpec(hyp=SEED_HYP, space=read_space(TrainConfig(evolve=1))[0], budget=budget)


def outcome(fitness: float) -> Any:
    """Return a result with this fitness."""
    from starling.search.outcome import Outcome

    names = ("precision", "recall", "map50", "map5095", "box_loss", "obj_loss", "cls_loss")
    return Outcome(fitness=fitness, metrics=dict.fromkeys(names, 0.5))


def join(folder: Path) -> Any:
    """Open the study as an additional worker, with room in its budget."""
    from starling.search.study import SearchStudy

    return SearchStudy.open_or_create(folder, search_spec(10**6))


def ask_and_tell(study: Any) -> tuple[float, float]:
    """Return the seconds that the study takes to give out a candidate, and to take its result."""
    begun = time.perf_counter()
    claim = study.ask("bench")
    asked = time.perf_counter()
    study.finish(claim, outcome(0.5))
    return asked - begun, time.perf_counter() - asked


def journal(count: int, fresh: int = 3, warm: int = 100) -> dict[str, Any]:
    """Return the cost of a journal of `count` trials: medians of workers that join, and of a worker that goes on."""
    from starling.search.exports import write_files

    joined: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        fill(join(Path(folder)), count)
        for _ in range(fresh):
            begun = time.perf_counter()
            study = join(Path(folder))
            opened = time.perf_counter() - begun
            ask, tell_ = ask_and_tell(study)
            joined.append({"open_s": opened, "ask_s": ask, "tell_s": tell_, "both_s": ask + tell_})
        both = sorted(sum(ask_and_tell(study)) for _ in range(warm))
        begun = time.perf_counter()
        write_files(study)
        files = time.perf_counter() - begun
        size = (Path(folder) / "study.journal").stat().st_size
    first = {name: statistics.median(each[name] for each in joined) for name in joined[0]}
    return {"trials": count, "bytes": size, "open_s": first["open_s"], "first_ask_s": first["ask_s"],
            "first_ask_and_tell_s": first["both_s"], "ask_and_tell_s": statistics.median(both),
            "ask_and_tell_p95_s": both[int(len(both) * 0.95)], "files_s": files}  # fmt: skip


def main() -> int:
    """Measure, and print a table or one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", help="numbers of workers [1 2 4 8; 1 2 with --real]"
    )
    parser.add_argument("--each", type=int, default=6, help="trainings a worker [%(default)s]")
    parser.add_argument("--sleep", type=float, default=2.0, help="seconds of a training [%(default)s]")
    parser.add_argument(
        "--rounds", type=int, default=1, help="rounds, of which the best counts [%(default)s]"
    )
    parser.add_argument("--real", action="store_true", help="train")
    parser.add_argument("--data", default=str(REPOSITORY / "datasets" / "bccd-mini" / "bccd.yaml"))
    parser.add_argument("--cfg", default="yolov5n.yaml")
    parser.add_argument("--img", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--journal", type=int, metavar="TRIALS", help="measure a journal of this many trials")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.journal:
        return show_journal(journal(args.journal), as_json=args.json)
    rounds: dict[int, list[Throughput]] = {}
    for _ in range(args.rounds):
        for count in args.workers or ([1, 2] if args.real else [1, 2, 4, 8]):
            work = (training_worker, args) if args.real else (sleeping_worker, args.sleep)
            rounds.setdefault(count, []).append(measure(count, count * args.each, *work))
    best = [max(each, key=lambda done: done.rate) for each in rounds.values()]
    return show_scaling(best, as_json=args.json)


def show_scaling(measured: list[Throughput], *, as_json: bool) -> int:
    """Print throughputs, each relative to that of a single worker."""
    alone = measured[0].rate / measured[0].workers
    rows = [
        {"workers": done.workers, "trainings": done.trainings, "seconds": round(done.seconds, 2),
         "training_s": round(done.training_s, 3), "to_n_times_one": round(done.rate / (done.workers * alone), 4), "outside_of_training": round(done.outside, 4)}
        for done in measured
    ]  # fmt: skip
    if as_json:
        print(json.dumps({"machine": machine(), "load": os.getloadavg()[0], "rows": rows}))
        return 0
    print(f"{machine()}; load {os.getloadavg()[0]:.1f}")
    for row in rows:
        print(
            f"{row['workers']} workers: {row['trainings']} trainings of {row['training_s']:.2f} s in {row['seconds']:.2f} s, "
            f"{row['to_n_times_one']:.3f} of {row['workers']} x one; {row['outside_of_training']:.2%} of a worker's "
            "time outside of training"
        )
    return 0


def show_journal(measured: dict[str, Any], *, as_json: bool) -> int:
    """Print the cost of a large journal."""
    if as_json:
        print(json.dumps({"machine": machine(), "load": os.getloadavg()[0], **measured}))
        return 0
    ms = {name: value * 1000 for name, value in measured.items() if name.endswith("_s")}
    print(f"{machine()}; load {os.getloadavg()[0]:.1f}")
    print(f"{measured['trials']} trials, {measured['bytes'] / 1e6:.0f} MB: opened in {ms['open_s']:.0f} ms")
    print(
        f"a worker that just joined: ask {ms['first_ask_s']:.1f} ms, ask and tell {ms['first_ask_and_tell_s']:.1f} ms"
    )
    print(
        f"one that goes on: ask and tell {ms['ask_and_tell_s']:.1f} ms, 95 % within {ms['ask_and_tell_p95_s']:.1f} ms"
    )
    print(f"evolve.csv and hyp_evolve.yaml: {ms['files_s']:.0f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
