#!/usr/bin/env python3
"""The GPU time that a search needs, and what it finds: every sampler on the same landscape, in many searches.

    python bench/search_efficiency.py [--searches 100] [--workers 1 2 4 8] [--landscape gp|forest] [--plot FILE.png]

The landscape comes from bench/search_table.csv, real trainings of a small detector (bench/search_table.py). A model
gives values between the table's rows; its error on unseen rows is printed. Each training gets the luck of a real one,
the difference between seeds. The study, its samplers, its pruning and its finals are the product's own, with a clock
that only counts; nothing is trained. A search is judged by the mean fitness of its winner, without luck. Its cost is
counted in images through the model: an image in validation costs a third of one in training, and pruned trainings and
repetitions are counted too.
"""

from __future__ import annotations

import argparse
import heapq
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from common import REPOSITORY, machine
from search_landscape import CLASSIC, Landscape

from starling.core.settings.train import SAMPLERS, Sampler
from starling.errors import Pruned
from starling.search.outcome import Outcome, best_of
from starling.search.samplers.fast import FastSampler, FastSettings
from starling.search.samplers.proposer import Proposer
from starling.search.spec import StudyPlan, StudySpec
from starling.search.study import LeasedCandidate, SearchStudy, Turn

TABLE = REPOSITORY / "bench" / "search_table.csv"
TRAIN_IMAGES, VAL_IMAGES = 205, 87
"""Numbers of images of the dataset that the table was made with."""
VALIDATION_SHARE = 1 / 3
BUDGET, BUDGETS = 60, (16, 20, 24, 30, 40, 60)
"""Number of trainings of a usual evolution, and smaller budgets that may find as much."""
FINALISTS = 3


def main() -> int:
    """Replay the searches, and print the table or one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--landscape", choices=("gp", "forest"), default="gp")
    parser.add_argument("--searches", type=int, default=100, help="of each method and number of workers")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, help="draw what was found against images")
    args = parser.parse_args()
    landscape = Landscape.read(args.table, args.landscape)
    found = _replay(args)
    if args.json:
        print(json.dumps({"machine": machine(), "landscape": landscape.facts(), "found": found}))
    else:
        print(f"{machine()}\n{landscape.describe()}\n")
        _print(found, landscape)
    if args.plot:
        _plot(found, landscape, args.plot)
    return 0


@dataclass(frozen=True)
class Method:
    """One method of searching."""

    sampler: Sampler
    budgets: tuple[int, ...]
    prune: bool = False
    judge: str = "model"
    """Judge of the fast sampler."""


METHODS = {
    **{name: Method(name, (BUDGET // 3, BUDGET)) for name in SAMPLERS if name != "gp"},
    "fast": Method("fast", BUDGETS),
    "random": Method("random", (BUDGET // 3, BUDGET, 2 * BUDGET)),
    "fast --prune": Method("fast", BUDGETS, prune=True),
    "fast, density": Method("fast", (BUDGET // 3, BUDGET), judge="density"),
    "classic --prune": Method("classic", BUDGETS, prune=True),
}


# --- a search without training --------------------------------------------------------------------------


class _NoLease:
    """A lease that is never lost, because the workers here are not processes."""

    def renew(self) -> None: ...

    def close(self) -> None: ...

    def abandon(self) -> None: ...

    def keep_alive(self, every_s: float) -> None: ...


class _Watch:
    def verdict(self, number: int) -> None:
        return None

    def revoke(self, number: int) -> None: ...


class Memory:
    """A study's storage in the memory of this process."""

    where, study_name, spans_hosts = "memory", "search", False

    def __init__(self) -> None:
        self.optuna = optuna.storages.InMemoryStorage()

    def lock(self) -> AbstractContextManager[None]:
        return nullcontext()

    def persist(self, operation: Any) -> Any:
        return operation()

    def take_lease(self, number: int, worker: str) -> _NoLease:
        return _NoLease()

    def watch(self, lease_s: float, monotonic: Any) -> _Watch:
        return _Watch()


@dataclass(frozen=True)
class Found:
    """The result of one search."""

    quality: float
    """Mean fitness of the winner, without luck."""
    images: float
    trainings: int
    """Number of started trainings."""
    hours: float
    """Time of the slowest worker, in trainings of full length."""


class Replay:
    """One search with several workers, on a clock that counts images."""

    def __init__(self, landscape: Landscape, method: Method, budget: int, workers: int, seed: int) -> None:
        self._landscape, self._seed, self._workers = landscape, seed, workers
        self.images = 0.0
        self.trainings = 0
        plan = StudyPlan(epochs=landscape.epochs, prune=method.prune, finalists=FINALISTS * method.prune)
        self._study = SearchStudy.open_or_create(
            Path("memory"),
            StudySpec(
                hyp=landscape.seed, space=CLASSIC, budget=budget, seed=seed, plan=plan, sampler=method.sampler
            ),
            storage=Memory(),
        )
        if method.judge != "model":
            settings = FastSettings(judge=method.judge)  # type: ignore[arg-type]
            space = CLASSIC.starting_from(landscape.seed)
            sampler = FastSampler(space, landscape.seed, seed, settings)
            self._study._proposer = Proposer(space, landscape.seed, method.sampler, sampler)

    def run(self) -> Found:
        """Let the workers work until the budget is met."""
        now = 0.0
        events = [(0.0, worker, self._work(worker)) for worker in range(self._workers)]
        while events:
            now, worker, work = heapq.heappop(events)
            pause = next(work, None)
            if pause is not None:
                heapq.heappush(events, (now + pause, worker, work))
        winner = best_of(self._study.finished())
        quality = float(self._landscape.mean(winner.hyp)[-1])
        full = self._landscape.epochs * TRAIN_IMAGES + VAL_IMAGES * VALIDATION_SHARE
        return Found(quality, self.images, self.trainings, now / full)

    def _work(self, worker: int) -> Iterator[float]:
        """Yield the cost in images of each stretch of work."""
        while (turn := self._study.ask(str(worker))) is not Turn.DONE:
            if isinstance(turn, LeasedCandidate):
                yield from self._train(turn)
            else:
                yield float(TRAIN_IMAGES)  # an epoch later there may be something to do

    def _train(self, claim: LeasedCandidate) -> Iterator[float]:
        candidate = claim.candidate
        self.trainings += 1
        random = np.random.default_rng([self._seed, candidate.number, 77])
        curve = self._landscape.train(candidate.hyp, random)
        done = 0
        for rung in (*candidate.glances, self._landscape.epochs):
            cost = (rung - done) * TRAIN_IMAGES + VAL_IMAGES * VALIDATION_SHARE
            done = rung
            self.images += cost
            yield cost
            if rung < self._landscape.epochs:
                try:
                    self._study.report(claim, rung, float(curve[rung - 1]))
                except Pruned as error:
                    self._study.prune(claim, error)
                    return
        self._study.finish(claim, Outcome(fitness=float(curve[-1])))


# --- many searches --------------------------------------------------------------------------------------

_landscape: Landscape | None = None


def _prepare(table: Path, kind: str) -> None:
    global _landscape
    _landscape = Landscape.read(table, kind)


def _search(job: tuple[str, int, int, int]) -> tuple[str, int, int, Found]:
    assert _landscape is not None, "prepared"
    name, budget, workers, seed = job
    return name, budget, workers, Replay(_landscape, METHODS[name], budget, workers, seed).run()


def _replay(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each method, budget and number of workers, over all searches."""
    jobs = [
        (name, budget, workers, seed)
        for name in args.methods
        for budget in METHODS[name].budgets
        for workers in args.workers
        for seed in range(args.searches)
    ]
    rows: dict[tuple[str, int, int], list[Found]] = {}
    with ProcessPoolExecutor(
        args.processes, initializer=_prepare, initargs=(args.table, args.landscape)
    ) as pool:
        for done, (name, budget, workers, found) in enumerate(pool.map(_search, jobs, chunksize=4), 1):
            rows.setdefault((name, budget, workers), []).append(found)
            if done % 500 == 0:
                print(f"{done}/{len(jobs)} searches", file=sys.stderr, flush=True)
    return [
        {
            "method": name,
            "budget": budget,
            "workers": workers,
            "quality": statistics.median(found.quality for found in searches),
            "low": float(np.quantile([found.quality for found in searches], 0.1)),
            "high": float(np.quantile([found.quality for found in searches], 0.9)),
            "images": statistics.median(found.images for found in searches),
            "trainings": statistics.median(found.trainings for found in searches),
            "time": statistics.median(found.hours for found in searches),
        }
        for (name, budget, workers), searches in rows.items()
    ]


def _print(found: Sequence[Mapping[str, Any]], landscape: Landscape) -> None:
    print(
        f"{'method':16} {'workers':>7} {'budget':>6} {'begun':>6} {'images':>8} {'found':>7}  10 to 90 %      time"
    )
    for row in found:
        print(
            f"{row['method']:16} {row['workers']:>7} {row['budget']:>6} {row['trainings']:>6.0f} {row['images']:>8.0f} "
            f"{row['quality']:>7.4f}  {row['low']:.4f} {row['high']:.4f}  {row['time']:>6.1f}"
        )
    print()
    for workers in dict.fromkeys(row["workers"] for row in found):
        here = [row for row in found if row["workers"] == workers]
        bar = next((r for r in here if r["method"] == "classic" and r["budget"] == BUDGET), None)
        if bar is None:
            continue
        for name in dict.fromkeys(row["method"] for row in here):
            reached = [row for row in here if row["method"] == name and row["quality"] >= bar["quality"]]
            least = min((row["images"] for row in reached), default=None)
            words = (
                "does not reach"
                if least is None
                else f"reaches with {least / bar['images']:.2f} of its images"
            )
            print(
                f"{workers} workers: {name} {words} what classic finds in {BUDGET} trainings ({bar['quality']:.4f})"
            )


def _plot(found: Sequence[Mapping[str, Any]], landscape: Landscape, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    counts = list(dict.fromkeys(row["workers"] for row in found))
    figure, axes = pyplot.subplots(1, len(counts), figsize=(4.2 * len(counts), 4), sharey=True, squeeze=False)
    for axis, workers in zip(axes[0], counts, strict=True):
        for name in dict.fromkeys(row["method"] for row in found):
            rows = sorted(
                (row for row in found if row["workers"] == workers and row["method"] == name),
                key=lambda row: row["images"],
            )
            thousands = [row["images"] / 1000 for row in rows]
            (line,) = axis.plot(thousands, [row["quality"] for row in rows], "o-", label=name, markersize=4)
            axis.fill_between(thousands, [r["low"] for r in rows], [r["high"] for r in rows],
                              color=line.get_color(), alpha=0.08)  # fmt: skip
        axis.set(title=f"{workers} worker" + "s" * (workers > 1), xlabel="thousand images through the model")
        axis.axhline(landscape.facts()["seed"], color="grey", linewidth=0.8, linestyle=":")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("mean fitness of the winner, median search")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
