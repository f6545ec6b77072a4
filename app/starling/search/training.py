"""One worker of a search from its command line: candidates trained for real, with data and device set up once."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from starling.config.hyp import Hyp
from starling.core.errors import CheckpointError, UsageError
from starling.core.settings.train import AUTO_FINALISTS, TrainConfig
from starling.distributed.group import Place
from starling.model.checkpoint import load_checkpoint, load_newest, require
from starling.outputs.atomic import write_atomic
from starling.outputs.folders import is_file, names_in, read_file, remove, remove_tree, rename
from starling.outputs.run_dir import RunDir, folder_below, make_run_dir, project_dir, runs_root
from starling.outputs.worker_status import WorkerStatus, worker_name
from starling.progress import Progress
from starling.search.estimate import seconds_left
from starling.search.outcome import (
    Candidate,
    CandidateFailed,
    Finished,
    Outcome,
    Report,
    SearchSummary,
    best_of,
)
from starling.search.outcome import Progress as SearchProgress
from starling.search.plan import StudyPlan
from starling.search.space_file import Space, changed, read_space, settings_flags
from starling.search.storage.journal import folder_locked
from starling.search.storage.storage import check_storage, open_storage
from starling.search.study import SearchStudy
from starling.search.throttle import Throttle
from starling.search.worker import run_search
from starling.search.yolo import TrainingSetups, check_layouts, layout_digest, searched_layouts
from starling.stop_signal import StopSignal
from starling.tracking.events import CANDIDATE_ARTIFACTS, SEARCH_ARTIFACTS, EventLog
from starling.tracking.process import Bridges, start_bridges
from starling.training.reporting import pictures
from starling.training.reporting.delivery import upload_results
from starling.training.reporting.hooks import Hook, find_hooks
from starling.training.reporting.provenance import dataset_fields, keep_changes, origin_tags
from starling.training.reporting.reporter import Reporter, RunLabel
from starling.training.reporting.results import METRICS, EpochRow
from starling.training.setup.data import report_findings
from starling.training.setup.preflight import check_before_fetching
from starling.training.trainer import Diverged, Glances, TrainResult
from starling.training.training import (
    RESUMED,
    TrainingSetup,
    draw_weights,
    finish_bridges,
    read_hyp,
    train_in,
    warn_of_idle,
)

WORKERS_FOLDER = "workers"
"""Below the search's folder: one event log a worker."""

ESTIMATE_SHARE = 0.005
"""Most of a worker's time that working out the search's end may take."""
FINALISTS = 3
"""With `--prune`, unless asked for otherwise: cutting short finds more, and some of it is luck."""
DRAWN = ".drawn"
"""Names the weights whose pictures are all drawn."""
WINNERS_PICTURE = "confusion_matrix.png"
"""One of the pictures of what `weights/best.pt` finds: where it is not, they have to be drawn."""

COMPARED = ("epochs", "batch_size", "optimizer", "single_cls", "cos_lr", "freeze", "weights", "noautoanchor",
            "rect", "quad", "image_weights", "multi_scale")  # fmt: skip
"""Settings that the fitness depends on: every worker of a search has the same ones."""


def search(config: TrainConfig) -> None:
    """Work on the search that `--project` and `--name` name until its budget is met."""
    if Place.from_environment() is not None:
        raise UsageError(
            "--evolve under torchrun: the workers of a search train candidates of their own and meet in the study; "
            "start one worker a device without torchrun, or all at once with `launcher up --gpus`"
        )
    progress = Progress()
    hooks = find_hooks(config.hooks)
    directory = folder_below(project_dir(config.run_project, runs_root()), config.run_name)
    check_storage(config.study, directory, allow_nfs=config.allow_nfs)
    seed_hyp = read_hyp(config)
    space, seed_settings = read_space(config)
    check_before_fetching(config)
    check_layouts(space, config)
    setups = TrainingSetups(config, seed_hyp, progress.say)
    config = setups.usual.config
    warn_of_idle(config, seed_hyp, setups.usual.data, progress.say)
    make_run_dir(directory)
    worker = worker_name()
    log = EventLog(directory / WORKERS_FOLDER / worker / "events.jsonl", warn=progress.say)
    progress.say(f"search: {directory} (worker {worker})")
    report_findings(setups.usual.data, directory, progress.say)
    with StopSignal() as stop:
        bridges = start_bridges(log, warn=progress.say)
        trainings = _Trainings(config, setups, directory, log, bridges, progress, stop, hooks)
        try:
            summary = run_search(
                directory=directory,
                seed_hyp=seed_hyp.as_dict(),
                budget=config.evolve,
                study_seed=config.seed,
                plan=_plan(config),
                signature=_signature(config, setups.usual, space),
                space=space,
                seed_settings=seed_settings,
                sampler=config.sampler,
                objective=trainings.train,
                storage=open_storage(
                    config.study, directory, progress.say, check_stop=stop.raise_if_requested
                ),
                say=progress.say,
                on_open=trainings.joined,
                on_progress=trainings.progressed,
                on_ended=trainings.ended,
                check_stop=stop.raise_if_requested,
            )
            trainings.finished(summary)
        finally:
            finish_bridges(bridges, stop)
    _say_summary(summary, directory, progress)
    upload_results(config, directory, progress.say)
    if config.json:
        document = {**_as_json(summary, directory), **setups.usual.data.account()}
        print(json.dumps(document), flush=True)


def _as_json(summary: SearchSummary, directory: Path) -> dict[str, Any]:
    metrics = summary.best.metrics
    return {
        **{key: metrics[key] for key in ("precision", "recall")},
        "mAP50": metrics["map50"],
        "mAP50_95": metrics["map5095"],
        "fitness": summary.best.fitness,
        "candidate": summary.best.number,
        "finished": summary.progress.finished,
        "hyp": summary.best.hyp,
        "settings": summary.best.settings,
        "run": str(directory),
        "weights": str(RunDir(directory).best),
    }


def _plan(config: TrainConfig) -> StudyPlan:
    finalists = config.finalists
    if finalists == AUTO_FINALISTS:
        finalists = FINALISTS if config.prune else 0
    return StudyPlan(epochs=config.epochs, prune=config.prune, finalists=finalists)


def _signature(config: TrainConfig, setup: TrainingSetup, space: Space) -> dict[str, Any]:
    """Return what two workers must share for their fitnesses to be comparable."""
    values = config.as_dict()
    return {
        **{key: values[key] for key in COMPARED},
        "image_size": setup.image_size,
        "layout": layout_digest(setup.start.layout),
        "layouts": searched_layouts(space),
        "train": setup.data.train.digest,
        "val": setup.data.val.digest,
    }


class _Trainings:
    """Train candidates one after the other in one setup, and tell launcher and trackers about them."""

    def __init__(
        self,
        config: TrainConfig,
        setups: TrainingSetups,
        directory: Path,
        log: EventLog,
        bridges: Bridges,
        progress: Progress,
        stop: StopSignal,
        hooks: Mapping[str, Sequence[Hook]],
    ) -> None:
        self._hooks = hooks
        # Only the last epoch is validated: it is the one that counts, and the time goes into candidates.
        self._config = replace(config, noval=True, noplots=True, patience=0)
        self._setups, self._directory, self._log, self._bridges = setups, directory, log, bridges
        self._progress, self._stop = progress, stop
        self._status = WorkerStatus(runs_root(), worker_name(), progress.say)
        self._project = config.run_project.removeprefix("runs/")
        self._search = {"uuid": "", "name": config.run_name}
        self._told = 0
        """Finished trainings when the trackers were last told."""
        self._study: SearchStudy | None = None
        self._estimate: tuple[SearchProgress | None, float | None] = (None, None)
        """When the search is expected to end, by how far it was."""
        self._estimating = Throttle(ESTIMATE_SHARE)
        """Of working that out, which reads every attempt of the study."""

    def joined(self, study: SearchStudy) -> None:
        """Tell the trackers about the search itself, the parent of every candidate's run."""
        self._search["uuid"], self._study = study.uuid, study
        data = self._setups.usual.data
        study.describe(
            {"command": self._config.as_dict(), "train_images": len(data.train), "val_images": len(data.val)}
        )
        params = {**self._config.as_dict(), **{f"hyp/{key}": value for key, value in study.seed_hyp.items()}}
        keep_changes(RunDir(self._directory))
        self._log.append("run_start", run=study.uuid, name=self._search["name"], project=self._project,
                         dir=self._directory, shared=True, params=params,
                         tags=origin_tags(self._config, data.train))  # fmt: skip
        for fields in dataset_fields(self._config, data.train, data.val):
            self._log.append("dataset", run=study.uuid, **fields)

    def progressed(self, progress: SearchProgress, candidate: Candidate | None) -> None:
        """Show how far the search is and what this worker does."""
        self._status.update(
            phase="waiting" if candidate is None else "training",
            run_dir=str(self._directory),
            candidate=None if candidate is None else candidate.number,
            epoch=None,
            fitness=None,
            finished=progress.finished,
            budget=progress.budget,
            best_fitness=progress.best_fitness,
            search_ends_at=self._expected_end(progress),
        )
        if progress.best_fitness is not None and progress.finished != self._told:
            self._told = progress.finished
            values = {"search/best_fitness": progress.best_fitness, "search/failed": progress.failed}
            self._log.append("metrics", run=self._search["uuid"], step=progress.finished, values=values)

    def _expected_end(self, progress: SearchProgress) -> float | None:
        """Return the Unix time at which the search may end; worked out anew where something has changed."""
        if self._study is not None and self._estimate[0] != progress and self._estimating.is_due():
            began = time.monotonic()
            left = seconds_left(self._study.attempts(), progress, datetime.now())
            self._estimate = progress, None if left is None else time.time() + left
            self._estimating.took(time.monotonic() - began)
        return self._estimate[1]

    def finished(self, summary: SearchSummary) -> None:
        """Draw the winner's pictures, and tell the trackers that the whole search is done."""
        assert self._study is not None, "opened before the first candidate"
        with weights_locked(self._directory):
            keep_winners_weights(self._study)
            best, drawn = RunDir(self._directory).best, self._directory / WINNERS_PICTURE
            # Every worker comes by at the end; the first one draws.
            mark = self._directory / DRAWN
            if is_file(best) and not (drawn.exists() and _holds(mark, _stamp(best))):
                setup = self._setups.of(summary.best.settings)
                pictures.draw_labels(setup.data.train, self._directory)
                draw_weights(setup, best, self._directory)
                write_atomic(
                    mark, _stamp(best)
                )  # last: whoever was killed before it leaves all to be drawn again
        self._log.announce(self._directory, SEARCH_ARTIFACTS, run=self._search["uuid"])
        if best.is_file():
            self._log.append("model", run=self._search["uuid"], path=best.relative_to(self._directory), name="best",
                             step=0, values=_reached(summary.best))  # fmt: skip
        self._log.append("run_end", run=self._search["uuid"], status="finished")
        self._status.update(phase="done", candidate=None, eta_s=0, search_ends_at=None)

    def ended(self, candidate: Candidate) -> None:
        """Remove the checkpoints of a candidate that nobody will go on with, and of its interrupted attempts.

        A finalist's weights stay until it is known who has won.
        """
        run = RunDir(candidate.directory)
        if candidate.finalist_of is None:
            remove_tree(run.weights)
        else:
            for checkpoint in (run.last, run.previous):
                remove(checkpoint)
        for folder in candidate.resumes_from:
            # The folder stays: a worker that was frozen in a save may thaw, and is to fail at its lease, not at this.
            weights = RunDir(folder).weights
            for name in names_in(weights):
                if name.endswith(".pt"):
                    remove(weights / name)

    def train(self, candidate: Candidate, report: Report) -> Outcome:
        """Train one candidate. Raises CandidateFailed where the loss diverged."""
        setup = self._setups.of(candidate.settings)
        config = changed(self._config, candidate.settings)
        state = _newest_state(candidate, self._progress.say)
        run_uuid = state["run_uuid"] if state else uuid.uuid4().hex
        run = RunDir(candidate.directory)
        label = RunLabel(run_uuid, self._project, candidate.title, parent=self._search)
        prefix, self._progress.prefix = self._progress.prefix, f"{candidate.title}  "
        reporter = Reporter(label, run.path, progress=self._progress, status=self._status, events=self._log,
                            artifacts=CANDIDATE_ARTIFACTS, memory_bytes=setup.compute.memory_bytes,
                            hooks=self._hooks)  # fmt: skip
        hyp = Hyp.from_mapping(candidate.hyp, f"candidate {candidate.number}")

        if candidate.train_seed is not None:
            config = replace(config, seed=candidate.train_seed)

        def on_epoch(row: EpochRow) -> None:
            report()
            self._bridges.check()

        try:
            # No recovery: a candidate that needs a lower rate or smaller batches is not the one that was asked for.
            result = train_in(
                setup, config, hyp, run, reporter, self._stop, state, on_epoch, recover=False,
                glances=Glances(candidate.glances, report),
            )  # fmt: skip
        except Diverged as error:
            raise CandidateFailed(str(error)) from None
        finally:
            self._progress.prefix = prefix
        if candidate.finalist_of is None:
            keep_best_weights(self._directory, run, result.best.fitness)
        return _outcome(result)


def _reached(best: Finished) -> dict[str, float]:
    """Return what the winner reached, under the names that results.csv has."""
    names = dict(zip(("precision", "recall", "map50", "map5095"), METRICS, strict=True))
    return {name: best.metrics[key] for key, name in names.items()}


def _outcome(result: TrainResult) -> Outcome:
    precision, recall, map50, map5095 = result.best.metrics
    box, obj, cls = result.best.val_losses
    return Outcome(fitness=result.best.fitness, precision=precision, recall=recall, map50=map50, map5095=map5095,
                   box_loss=box, obj_loss=obj, cls_loss=cls)  # fmt: skip


def _newest_state(candidate: Candidate, say: Callable[[str], None]) -> Mapping[str, Any] | None:
    """Return the checkpoint of an interrupted attempt at this candidate, if one is whole."""
    for folder in candidate.resumes_from:
        try:
            state, _ = load_newest(RunDir(folder).last, say)
            require(RunDir(folder).last, state, RESUMED)
            return state
        except CheckpointError as error:
            if RunDir(folder).last.exists():
                say(f"{error}; not taken")
    return None


def weights_locked(directory: Path) -> AbstractContextManager[None]:
    """Exclude the other workers from the `weights` folder of a search; its `best.pt` is compared, then replaced."""
    return folder_locked(directory / "weights.lock", RunDir(directory).weights)


def keep_best_weights(directory: Path, run: RunDir, fitness: float) -> None:
    """Keep the weights of the search's best candidate as `weights/best.pt`.

    Its checkpoint stays until the study has the result: without it, a worker that is killed or refused by a full disk
    just then would have trained for nothing.
    """
    best = RunDir(directory).best
    with weights_locked(directory):
        if not is_file(best) or fitness > _fitness_of(best):
            rename(run.best, best)
            # It shows the one before. Times of files may not tell: a clock may have been put right meanwhile.
            remove(directory / WINNERS_PICTURE)


def keep_winners_weights(study: SearchStudy) -> None:
    """Make `weights/best.pt` the winner's where finalists decided who that is, and drop the other finalists'.

    Of its trainings on fresh seeds that left weights here the best is taken.
    """
    finished = study.finished()
    winner = best_of(finished)
    finals = [training for training in finished if training.finalist_of is not None]
    runs = {training.number: RunDir(study.candidate_dir(training.number)) for training in finals}
    mine = [t for t in finals if t.finalist_of == winner.number and is_file(runs[t.number].best)]
    if mine:
        taken = max(mine, key=lambda training: training.fitness)
        # In this order a worker that is killed on the way leaves the best of them to the next one.
        for number, run in runs.items():
            if number != taken.number:
                remove_tree(run.weights)
        remove(study.directory / WINNERS_PICTURE)
        rename(runs[taken.number].best, RunDir(study.directory).best)
    for run in runs.values():
        remove_tree(run.weights)


def _stamp(path: Path) -> str:
    """Return what tells a weights file from another."""
    found = path.stat()
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns}"


def _holds(path: Path, text: str) -> bool:
    return is_file(path) and read_file(path) == text.encode()


def _fitness_of(path: Path) -> float:
    try:
        rows = [EpochRow.from_list(values) for values in load_checkpoint(path)["rows"]]
    except (CheckpointError, LookupError, TypeError, ValueError):
        return float("-inf")
    return max((row.fitness for row in rows if row.validated), default=float("-inf"))


def _say_summary(summary: SearchSummary, directory: Path, progress: Progress) -> None:
    best, seed = summary.best, summary.seed_fitness
    before = "" if seed is None else f", from {seed:.4f} with the hyperparameters it started from"
    progress.say(
        f"search finished: {summary.progress.finished} trainings, {summary.trained_here} of them here"
    )
    progress.say(f"best fitness {best.fitness:.4f} (candidate {best.number}){before}")
    if best.settings:
        progress.say(f"trained with {settings_flags(best.settings)}")
    progress.say(
        f"results in {directory}: report.html, hyp_evolve.yaml, evolve.csv, evolve.png, weights/best.pt and its pictures"
    )
