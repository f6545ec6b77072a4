"""Report a search and its candidates to the launcher and the trackers."""

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
    """Report one worker's part in a search to launcher and trackers, through its status file and its event log."""

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
        """Number of finished trainings at the last report to the trackers."""

    def began(self, data: TrainingData) -> None:
        """Report the search itself to the trackers, as the parent of every candidate's run."""
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
        """Yield the reporter of one candidate's training; until its end, lines begin with the candidate's name."""
        label = RunLabel(run_uuid, self._project, candidate.title, parent=self._search)
        prefix, self.console.prefix = self.console.prefix, f"{candidate.title}  "
        try:
            yield Reporter(label, candidate.directory, progress=self.console, status=self._status, events=self._log,
                           artifacts=CANDIDATE_ARTIFACTS, memory_bytes=memory_bytes, hooks=self._hooks)  # fmt: skip
        finally:
            self.console.prefix = prefix

    def progressed(self, progress: SearchProgress, candidate: Candidate | None) -> None:
        """Report the progress of the search and the current candidate of this worker."""
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
        """Report to the trackers that the whole search is done, with the winner's weights."""
        directory, run = self._study.directory, self._study.uuid
        self._log.announce(directory, SEARCH_ARTIFACTS, run=run)
        if weights.is_file():
            # Metrics under their names in results.csv.
            values = dict(zip(METRICS, metrics_of(best).values(), strict=False))
            self._log.append("model", run=run, path=weights.relative_to(directory), name="best",
                             step=0, values=values)  # fmt: skip
        self._log.append("run_end", run=run, status="finished")
        self._status.update(phase="done", candidate=None, eta_s=0, search_ends_at=None)
