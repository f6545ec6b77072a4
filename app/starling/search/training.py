"""One worker of a search from its command line: set up the search, run the worker, report the result."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from starling.core.errors import UsageError
from starling.core.settings.train import AUTO_FINALISTS, TrainConfig
from starling.core.worker_status import worker_name
from starling.distributed.group import Rank
from starling.outputs.run_dir import RunDir, folder_below, make_run_dir, project_dir, runs_root
from starling.progress import console
from starling.search.exports import metrics_of
from starling.search.outcome import SearchSummary
from starling.search.reporting import SearchReporter
from starling.search.space import settings_flags
from starling.search.space_file import read_space
from starling.search.spec import StudyPlan, StudyRules, StudySpec
from starling.search.storage.storage import check_storage, open_storage
from starling.search.study import SearchStudy
from starling.search.winner import draw_winner, keep_winners_weights, weights_locked
from starling.search.worker import Worker, WorkerSettings
from starling.search.yolo import TrainingSetups, YoloTrainer, check_layouts, layout_digest, searched_layouts
from starling.stop_signal import StopSignal
from starling.tracking.events import EventLog
from starling.tracking.process import start_bridges
from starling.training.reporting.delivery import upload_results
from starling.training.reporting.hooks import find_hooks
from starling.training.setup.data import report_findings
from starling.training.setup.preflight import check_before_fetching
from starling.training.training import finish_bridges, read_hyp, warn_of_idle

logger = logging.getLogger(__name__)

WORKERS_FOLDER = "workers"
"""Folder below the search's folder with one event log per worker."""
FINALISTS = 3
"""Number of finalists with `--prune` by default: pruned searches find better candidates, and some of these are luck."""
COMPARED = ("epochs", "batch_size", "optimizer", "single_cls", "cos_lr", "freeze", "weights", "noautoanchor",
            "rect", "quad", "image_weights", "multi_scale")  # fmt: skip
"""Settings that the fitness depends on; all workers of a search must have the same values."""


def search(config: TrainConfig) -> None:
    """Work on the search that `--project` and `--name` name, until its budget is met."""
    if Rank.from_environment() is not None:
        raise UsageError(
            "--evolve under torchrun: the workers of a search train candidates of their own and meet in the study; "
            "start one worker a device without torchrun, or all at once with `launcher up --gpus`"
        )
    hooks = find_hooks(config.hooks)
    directory = folder_below(project_dir(config.run_project, runs_root()), config.run_name)
    check_storage(config.study, directory, allow_nfs=config.allow_nfs)
    setups, spec = _set_up(config)
    config, data = setups.usual.config, setups.usual.data
    make_run_dir(directory)
    log = EventLog(directory / WORKERS_FOLDER / worker_name() / "events.jsonl")
    logger.info(f"search: {directory} (worker {worker_name()})")
    report_findings(data, directory)
    with StopSignal() as stop:
        check_stop = stop.raise_if_requested
        bridges = start_bridges(log)
        try:
            storage = open_storage(config.study, directory, check_stop=check_stop)
            study = SearchStudy.open_or_create(directory, spec, storage=storage, rules=StudyRules())
            # Only the last epoch is validated: only its fitness counts, and the time is better spent on candidates.
            config = replace(config, noval=True, noplots=True, patience=0)
            reporter = SearchReporter(study, config, log, console(), hooks)
            reporter.began(data)
            trainer = YoloTrainer(study, config, setups, reporter, bridges, stop)
            worker = Worker(study, trainer, settings=WorkerSettings(), check_stop=check_stop)
            summary = worker.run()
            _show_winner(study, summary, setups, reporter)
        finally:
            finish_bridges(bridges, stop)
    _tell_summary(summary, directory)
    upload_results(config, directory)
    if config.json:
        print(json.dumps({**_as_json(summary, directory), **data.account()}), flush=True)


def _set_up(config: TrainConfig) -> tuple[TrainingSetups, StudySpec]:
    """Open data and device, and return them with what is searched; what can be wrong with either is found here."""
    space, settings = read_space(config)
    hyp = read_hyp(config)
    check_before_fetching(config)
    check_layouts(space, config, hyp)
    setups = TrainingSetups(config, hyp)
    usual = setups.usual
    config = usual.config
    warn_of_idle(config, hyp, usual.data)
    values = config.as_dict()
    signature = {
        **{key: values[key] for key in COMPARED},
        "image_size": usual.image_size,
        "layout": layout_digest(usual.start.layout),
        "layouts": searched_layouts(space),
        "train": usual.data.train.digest,
        "val": usual.data.val.digest,
    }
    finalists = config.finalists
    if finalists == AUTO_FINALISTS:
        finalists = FINALISTS if config.prune else 0
    spec = StudySpec(
        hyp=hyp.as_dict(),
        space=space,
        settings=settings,
        budget=config.evolve,
        plan=StudyPlan(epochs=config.epochs, prune=config.prune, finalists=finalists),
        seed=config.seed,
        signature=signature,
        sampler=config.sampler,
    )
    return setups, spec


def _show_winner(
    study: SearchStudy, summary: SearchSummary, setups: TrainingSetups, reporter: SearchReporter
) -> None:
    """Draw the winner's plots, and report to the trackers that the whole search is done.

    Every worker calls this function at the end; the first one draws.
    """
    with weights_locked(study.directory):
        keep_winners_weights(study)
        draw_winner(setups.of(summary.best.settings), study.directory)
    reporter.finished(summary.best, RunDir(study.directory).best)


def _as_json(summary: SearchSummary, directory: Path) -> dict[str, Any]:
    metrics = metrics_of(summary.best)
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


def _tell_summary(summary: SearchSummary, directory: Path) -> None:
    best, seed = summary.best, summary.seed_fitness
    before = "" if seed is None else f", from {seed:.4f} with the hyperparameters it started from"
    logger.info(
        f"search finished: {summary.progress.finished} trainings, {summary.trained_here} of them here"
    )
    logger.info(f"best fitness {best.fitness:.4f} (candidate {best.number}){before}")
    if best.settings:
        logger.info(f"trained with {settings_flags(best.settings)}")
    logger.info(
        f"results in {directory}: report.html, hyp_evolve.yaml, evolve.csv, evolve.png, weights/best.pt and its plots"
    )
