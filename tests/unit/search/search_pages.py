"""Searches made up for tests of the report: attempts in a row, as two workers would leave them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from starling.search.outcome import Attempt, Finished, SearchProgress, State, best_of
from starling.search.report.facts import ReportFacts, costs_of
from starling.search.trial_counts import seconds_between, seconds_left

BEGAN = datetime(2026, 8, 1, 9, 0)
SEED = {"lr0": 0.01, "momentum": 0.9, "mixup": 0.0, "scale": 0.5, "fliplr": 0.5}
COMMAND = {
    "weights": "yolov5s.pt", "cfg": "", "data": "my data/blood.yaml", "imgsz": 320, "batch_size": 8, "epochs": 10,
    "optimizer": "AdamW", "freeze": [10], "cos_lr": True, "rect": False, "project": "blood",
}  # fmt: skip


def attempt(number: int, **changes: Any) -> Attempt:
    """Return a finished attempt of ten minutes, the fields changed as given."""
    began = BEGAN + timedelta(minutes=10 * number)
    values: dict[str, Any] = {
        "number": number, "root": number, "state": State.FINISHED, "hyp": dict(SEED), "worker": f"gpu{number % 2}",
        "began": began, "ended": began + timedelta(minutes=10), "fitness": 0.3, "curve": {}, "reason": "",
    }  # fmt: skip
    values |= changes
    if values["state"] is not State.FINISHED:
        values["fitness"] = None
    values.setdefault("metrics", metrics(values["fitness"]))
    return Attempt(**values)


def metrics(fitness: float | None) -> dict[str, float]:
    """Return the seven figures of a finished training."""
    if fitness is None:
        return {}
    names = ("precision", "recall", "map50", "map5095", "box_loss", "obj_loss", "cls_loss")
    return dict.fromkeys(names, fitness)


def search(count: int, seed: int = 0) -> list[Attempt]:
    """Return a search in which lr0 decides and momentum does little; every fifth is pruned, every ninth fails."""
    rng = np.random.default_rng(seed)
    attempts = []
    for number in range(count):
        hyp = {**SEED, "lr0": float(rng.uniform(0.001, 0.1)), "momentum": float(rng.uniform(0.6, 0.98)),
               "scale": float(rng.uniform(0, 0.9))}  # fmt: skip
        hyp = dict(SEED) if number == 0 else hyp
        fitness = 0.5 - 3 * abs(hyp["lr0"] - 0.05) + 0.01 * hyp["momentum"]
        changes: dict[str, Any] = {"hyp": hyp, "fitness": fitness}
        if number % 5 == 4:
            changes |= {"state": State.PRUNED, "curve": {3: fitness / 2}, "reason": "behind", "epochs": 3}
        elif number % 9 == 8:
            changes |= {"state": State.FAILED, "reason": "out of memory", "epochs": 1}
        attempts.append(attempt(number, **changes))
    return attempts


def facts_of(attempts: Sequence[Attempt], **changes: Any) -> ReportFacts:
    """Return the facts of a search with these attempts."""
    finished = [
        Finished(
            number=a.number, hyp=a.hyp, fitness=a.fitness or 0.0, metrics=a.metrics, worker=a.worker,
            is_seed=a.root == 0,
        )
        for a in attempts
        if a.state is State.FINISHED
    ]  # fmt: skip
    values: dict[str, Any] = {
        "name": "blood/search",
        "directory": Path("runs/blood/search").absolute(),
        "now": BEGAN + timedelta(days=1),
        "progress": SearchProgress(
            budget=max(len(finished), 1),
            finished=len(finished),
            running=sum(a.state is State.RUNNING for a in attempts),
            failed=sum(a.state is State.FAILED for a in attempts),
            best_fitness=None,
        ),
        "attempts": attempts,
        "finished": finished,
        "best": best_of(finished) if finished else None,
        "seed_hyp": SEED,
        "signature": {"epochs": 10},
        "training": {"command": COMMAND, "train_images": 100, "val_images": 30},
        "imported": 0,
        "costs": costs_of(attempts, full_epochs=10, train_images=100, val_images=30),
    }
    return ReportFacts(**{**values, **changes})


def time_left(attempts: Sequence[Attempt], progress: SearchProgress, now: datetime) -> float | None:
    """Return the seconds until the budget is met, from the attempts themselves."""
    ended = [attempt for attempt in attempts if attempt.state is not State.RUNNING]
    began = [attempt.began for attempt in attempts if attempt.state is State.RUNNING and attempt.began]
    took = sum(seconds_between(attempt.began, attempt.ended) for attempt in ended)
    return seconds_left(took, began, progress, now)
