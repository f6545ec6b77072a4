"""What tests of a search share: the classic space, a study's spec, an outcome, and a trainer made of a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from starling.core.settings.train import TrainConfig
from starling.search.outcome import Candidate, Outcome, Report, SearchProgress, SearchSummary
from starling.search.space_file import read_space
from starling.search.spec import StudyRules, StudySpec
from starling.search.storage.storage import StudyStorage
from starling.search.study import SearchStudy
from starling.search.worker import CandidateTrainer, Worker, WorkerSettings

CLASSIC, _ = read_space(TrainConfig(evolve=1))
"""The space that a search changes unless it is asked for another."""
METRICS = {"precision": 0.5, "recall": 0.5, "map50": 0.6, "map5095": 0.4, "box_loss": 0.1, "obj_loss": 0.2,
           "cls_loss": 0.3}  # fmt: skip

Train = Callable[[Candidate, Report], Outcome]


def outcome(fitness: float, **metrics: float) -> Outcome:
    """Return a result with this fitness."""
    return Outcome(fitness=fitness, metrics={**METRICS, **metrics})


def spec(hyp: Mapping[str, float | None], budget: int, **changes: Any) -> StudySpec:
    """Return what a test's search is about."""
    return StudySpec(**{"hyp": hyp, "budget": budget, "space": CLASSIC, **changes})


class FunctionTrainer(CandidateTrainer):
    """Trains by calling a function."""

    def __init__(
        self,
        train: Train,
        progressed: Callable[[SearchProgress, Candidate | None], None] = lambda progress, candidate: None,
        ended: Callable[[Candidate], None] = lambda candidate: None,
    ) -> None:
        self._train = train
        self.progressed, self.ended = progressed, ended  # type: ignore[method-assign]

    def train(self, candidate: Candidate, report: Report) -> Outcome:
        """Call the function."""
        return self._train(candidate, report)


def run_search(
    directory: Path,
    train: Train | CandidateTrainer,
    spec: StudySpec,
    *,
    settings: WorkerSettings | None = None,
    rules: StudyRules | None = None,
    storage: StudyStorage | None = None,
    **given: Any,
) -> SearchSummary:
    """Work on a search as one worker; quickly, and without drawing, unless the settings say otherwise."""
    study = SearchStudy.open_or_create(directory, spec, storage=storage, rules=rules)
    settings = settings or WorkerSettings(name="w", poll_s=0.02, plot=False)
    trainer = FunctionTrainer(train) if callable(train) else train
    return Worker(study, trainer, settings=settings, **given).run()
