"""The figures of the report, computed from the study, without HTML."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from starling.outputs.run_dir import runs_root
from starling.search.outcome import (
    BEST_HYP,
    Attempt,
    Finished,
    SearchProgress,
    State,
    best_of,
    seed_fitness_of,
)
from starling.search.study import SearchStudy

VALIDATION_SHARE = 1 / 3
"""Cost of an image in a validation (forward only) relative to training (forward and backward)."""
FEWEST_FOR_IMPORTANCE = 50
"""Minimum number of finished candidates; with fewer, the importance of 29 genes is hardly better than guessing."""
IMPORTANCE_TREES = 64
IMPORTANCE_METHOD = "mean decrease of impurity in a random forest of 64 trees (Optuna's MeanDecreaseImpurityImportanceEvaluator)"
"""The method of the gene importance, in words.

Of Optuna's evaluators, this one found most of the important genes in simulated searches of 24 genes, six with an
effect, with the classic sampler: 0.43 of the effect among its first six at 50 trials, 0.57 at 100, 0.74 at 300 and 0.92
at 1,000, against 0.20, 0.23, 0.17 and 0.58 by PED-ANOVA, and 0.38, 0.50 and 0.56 by fANOVA (which takes seconds); guessing gives
0.25, and at 20 trials no evaluator does better. The evaluation of 1,000 trials takes a second.
"""
LONG_EPOCHS = 300
"""Minimum epochs of the proposed training: a usual full training."""
_FLAGS = ("weights", "cfg", "data", "imgsz", "batch_size", "optimizer", "freeze")
_SWITCHES = ("single_cls", "cos_lr", "rect", "quad", "image_weights", "multi_scale", "noautoanchor")
_SHORT = {"imgsz": "--img", "batch_size": "--batch"}
_DEFAULTS = {"optimizer": "SGD", "freeze": [0], "cfg": ""}
"""Values that need no flag."""


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one attempt."""

    epochs: int
    """Epochs trained in this attempt."""
    images: float | None
    """Images through the model, with a third of the validation images; None if the study does not record its images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportFacts:
    """The state of a search at one time."""

    name: str
    directory: Path
    now: datetime
    progress: SearchProgress
    attempts: Sequence[Attempt]
    finished: Sequence[Finished]
    best: Finished | None
    seed_hyp: Mapping[str, float]
    signature: Mapping[str, Any]
    training: Mapping[str, Any]
    imported: int
    costs: Mapping[int, Cost]
    """Cost by the number of the attempt."""

    @property
    def seed_fitness(self) -> float | None:
        """Fitness of the hyp that the search started from; None before that training has finished."""
        return seed_fitness_of(self.finished)

    @property
    def genes(self) -> list[str]:
        """Hyperparameters that differ between attempts, in their order."""
        return [name for name in self.seed_hyp if len({a.hyp.get(name) for a in self.attempts}) > 1]

    def count(self, state: State) -> int:
        """Return the number of attempts in a state."""
        return sum(attempt.state is state for attempt in self.attempts)


def read_facts(study: SearchStudy, now: datetime) -> ReportFacts:
    """Return the facts of a study; running candidates are shown until the time `now`."""
    finished, attempts, training = study.finished(), study.attempts(), study.training
    return ReportFacts(
        name=f"{study.directory.parent.name}/{study.directory.name}",
        directory=study.directory,
        now=now,
        progress=study.progress(),
        attempts=attempts,
        finished=finished,
        best=best_of(finished) if finished else None,
        seed_hyp=study.seed_hyp,
        signature=study.signature,
        training=training,
        imported=study.imported(),
        costs=costs_of(
            attempts,
            full_epochs=_whole(study.signature.get("epochs")),
            train_images=_whole(training.get("train_images")),
            val_images=_whole(training.get("val_images")),
        ),
    )


def costs_of(
    attempts: Iterable[Attempt],
    *,
    full_epochs: int | None,
    train_images: int | None,
    val_images: int | None,
) -> dict[int, Cost]:
    """Return the cost of each attempt, by number.

    An attempt that continues another one costs only its own epochs, a finished one up to `full_epochs`. Unrecorded
    epochs (of a worker killed in its first candidate) are part of the cost of the attempt that continues the training.
    """
    costs: dict[int, Cost] = {}
    done_before: dict[int, int] = {}
    for attempt in attempts:
        before = done_before.get(attempt.root, 0)
        after = max(_epochs_done(attempt, full_epochs), before)
        done_before[attempt.root] = after
        images = None
        if train_images is not None:
            validations = sum(epoch > before for epoch in attempt.curve)
            validations += attempt.state is State.FINISHED  # the last validation is not in the curve
            images = (after - before) * train_images + validations * (val_images or 0) * VALIDATION_SHARE
        costs[attempt.number] = Cost(after - before, images)
    return costs


def _epochs_done(attempt: Attempt, full_epochs: int | None) -> int:
    if attempt.epochs is not None:
        return attempt.epochs
    if attempt.state is State.FINISHED and full_epochs is not None:
        return full_epochs
    return max(attempt.curve, default=0)


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


@dataclass(frozen=True, slots=True)
class WorkerTime:
    """How one worker spent its time, in seconds."""

    name: str
    attempts: Sequence[Attempt]
    busy: float
    """Seconds in trainings, with and without a result."""
    idle: float
    """Seconds between two trainings."""
    away: float
    """Seconds between an interrupted or lost training and the worker's next one."""

    @property
    def idle_share(self) -> float:
        """Return idle / (busy + idle)."""
        return self.idle / (self.busy + self.idle) if self.idle else 0.0


def worker_times(attempts: Iterable[Attempt], now: datetime) -> list[WorkerTime]:
    """Return the workers in the order of joining, by their own clocks; running trainings last until `now`."""
    by_worker: dict[str, list[Attempt]] = {}
    for attempt in sorted((a for a in attempts if a.began is not None), key=lambda a: (a.began, a.number)):
        by_worker.setdefault(attempt.worker, []).append(attempt)
    return [_time_of(name, own, now) for name, own in by_worker.items()]


def _time_of(name: str, own: list[Attempt], now: datetime) -> WorkerTime:
    busy = idle = away = 0.0
    free_since: datetime | None = None
    was_cut_off = False
    for attempt in own:
        began, ended = attempt.began, end_of(attempt, now)
        assert began is not None
        if free_since is not None and began > free_since:
            gap = (began - free_since).total_seconds()
            idle, away = (idle, away + gap) if was_cut_off else (idle + gap, away)
        # A lost attempt ends when another worker notices the loss, maybe after this worker is back.
        start = began if free_since is None else max(began, free_since)
        if ended > start:
            busy += (ended - start).total_seconds()
            free_since = ended
        was_cut_off = attempt.state in (State.LOST, State.STOPPED)
    return WorkerTime(name, own, busy, idle, away)


def end_of(attempt: Attempt, now: datetime) -> datetime:
    """Return the end of an attempt, never before its start; `now` for a running attempt."""
    began = attempt.began or now
    return max(attempt.ended or now, began)


def gene_importance(finished: Sequence[Finished], genes: Sequence[str]) -> dict[str, float]:
    """Return each gene's share of the importance, greatest first; empty for too few candidates or equal fitness.

    Deterministic; fixed genes are left out. `genes` are the names of the genes to compare.
    """
    varied = [name for name in genes if len({candidate.hyp[name] for candidate in finished}) > 1]
    if (
        len(finished) < FEWEST_FOR_IMPORTANCE
        or not varied
        or len({candidate.fitness for candidate in finished}) < 2
    ):
        return {}
    return _by_forest(finished, varied)


def _by_forest(finished: Sequence[Finished], varied: Sequence[str]) -> dict[str, float]:
    import optuna  # its importance module imports scikit-learn, which takes two seconds
    from optuna.distributions import FloatDistribution
    from optuna.importance import MeanDecreaseImpurityImportanceEvaluator, get_param_importances
    from optuna.trial import create_trial

    limits = {
        name: FloatDistribution(min(values), max(values))
        for name in varied
        for values in [[candidate.hyp[name] for candidate in finished]]
    }
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        create_trial(
            params={name: candidate.hyp[name] for name in varied},
            distributions=limits,
            value=candidate.fitness,
        )
        for candidate in finished
    )
    evaluator = MeanDecreaseImpurityImportanceEvaluator(n_trees=IMPORTANCE_TREES, seed=0)
    return dict(get_param_importances(study, evaluator=evaluator))


def winner_command(settings: Mapping[str, Any], directory: Path) -> str:
    """Return a `train.py` command, quoted for a shell; an empty string if the study does not have the settings."""
    if not settings.get("data"):
        return ""
    epochs = settings.get("epochs")
    words = ["python", "train.py"]
    for field in _FLAGS:
        value = settings.get(field)
        if value is None or value == _DEFAULTS.get(field):
            continue
        values = value if isinstance(value, list) else [value]
        words += [_SHORT.get(field, "--" + field.replace("_", "-")), *map(str, values)]
    words += ["--hyp", _from_here(directory / BEST_HYP)]
    words += ["--epochs", str(max(epochs, LONG_EPOCHS) if isinstance(epochs, int) else LONG_EPOCHS)]
    words += [f"--{field.replace('_', '-')}" for field in _SWITCHES if settings.get(field) is True]
    if settings.get("project"):
        words += ["--project", str(settings["project"])]
    words += ["--name", f"{directory.name}-winner"]
    return shlex.join(words)


def _from_here(path: Path) -> str:
    """Return a path below the runs folder as `runs/…`, valid inside and outside a container; another path unchanged."""
    root = runs_root()
    return str(Path(root.name) / path.relative_to(root)) if path.is_relative_to(root) else str(path)
