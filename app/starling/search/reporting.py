"""What the launcher and the trackers are told of a search and of its candidates."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from starling.core.settings.train import TrainConfig
from starling.core.worker_status import WorkerStatus, worker_name
from starling.outputs.run_dir import RunDir, runs_root
from starling.progress import Progress
from starling.search.exports import metrics_of
from starling.search.outcome import Candidate, Finished, SearchProgress
from starling.search.study import SearchStudy
from starling.tracking.events import CANDIDATE_ARTIFACTS, SEARCH_ARTIFACTS, EventLog
from starling.training.reporting.hooks import Hook
from starling.training.reporting.provenance import dataset_fields, keep_changes, origin_tags
from starling.training.reporting.reporter import Reporter, RunLabel
from starling.training.reporting.results import METRICS
from starling.training.setup.data import TrainingData

logger = logging.getLogger(__name__)


class SearchReporter:
    """Tells launcher and trackers of one worker's part in a search, in its status file and its event log."""

    def __init__(
        self,
        study: SearchStudy,
        config: TrainConfig,
        log: EventLog,
        console: Progress,
        hooks: Mapping[str, Sequence[Hook]],
    ) -> None:
        self._study, self._config, self._log, self._hooks = study, config, log, hooks
        self.console = console
        self._status = WorkerStatus(runs_root(), worker_name(), logger.warning)
        self._project = config.run_project.removeprefix("runs/")
        self._search = {"uuid": study.uuid, "name": config.run_name}
        self._told = 0
        """Finished trainings when the trackers were last told."""

    def began(self, data: TrainingData) -> None:
        """Tell the trackers about the search itself, the parent of every candidate's run."""
        study, config, log = self._study, self._config, self._log
        study.describe(
            {"command": config.as_dict(), "train_images": len(data.train), "val_images": len(data.val)}
        )
        params = {**config.as_dict(), **{f"hyp/{key}": value for key, value in study.seed_hyp.items()}}
        keep_changes(RunDir(study.directory))
        log.append("run_start", run=study.uuid, name=config.run_name, project=self._project,
                   dir=study.directory, shared=True, params=params,
                   tags=origin_tags(config, data.train))  # fmt: skip
        for fields in dataset_fields(config, data.train, data.val):
            log.append("dataset", run=study.uuid, **fields)

    @contextmanager
    def of_candidate(
        self, candidate: Candidate, run_uuid: str, memory_bytes: Callable[[], int]
    ) -> Iterator[Reporter]:
        """Yield what tells of one candidate's training; the lines for people begin with the candidate meanwhile."""
        label = RunLabel(run_uuid, self._project, candidate.title, parent=self._search)
        prefix, self.console.prefix = self.console.prefix, f"{candidate.title}  "
        try:
            yield Reporter(label, candidate.directory, progress=self.console, status=self._status, events=self._log,
                           artifacts=CANDIDATE_ARTIFACTS, memory_bytes=memory_bytes, hooks=self._hooks)  # fmt: skip
        finally:
            self.console.prefix = prefix

    def progressed(self, progress: SearchProgress, candidate: Candidate | None) -> None:
        """Show how far the search is and what this worker does."""
        left = self._study.seconds_left(datetime.now())
        self._status.update(
            phase="waiting" if candidate is None else "training",
            run_dir=str(self._study.directory),
            candidate=None if candidate is None else candidate.number,
            epoch=None,
            fitness=None,
            finished=progress.finished,
            budget=progress.budget,
            best_fitness=progress.best_fitness,
            search_ends_at=None if left is None else time.time() + left,
        )
        if progress.best_fitness is not None and progress.finished != self._told:
            self._told = progress.finished
            values = {"search/best_fitness": progress.best_fitness, "search/failed": progress.failed}
            self._log.append("metrics", run=self._study.uuid, step=progress.finished, values=values)

    def finished(self, best: Finished, weights: Path) -> None:
        """Tell the trackers that the whole search is done, and where the winner's weights are."""
        directory, run = self._study.directory, self._study.uuid
        self._log.announce(directory, SEARCH_ARTIFACTS, run=run)
        if weights.is_file():
            # Under the names that results.csv has.
            values = dict(zip(METRICS, metrics_of(best).values(), strict=False))
            self._log.append("model", run=run, path=weights.relative_to(directory), name="best",
                             step=0, values=values)  # fmt: skip
        self._log.append("run_end", run=run, status="finished")
        self._status.update(phase="done", candidate=None, eta_s=0, search_ends_at=None)
