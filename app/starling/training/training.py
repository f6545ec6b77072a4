"""One training from a command line to its results."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from starling.config.hyp import Hyp
from starling.config.yaml_reader import read_yaml
from starling.core.errors import CheckpointError, DataError, StarlingError, UsageError
from starling.core.files.atomic import sweep
from starling.core.files.safe_open import name_top, remove
from starling.core.settings.train import AUTO_BATCH, TrainCommand, TrainConfig
from starling.core.worker_status import WorkerStatus, worker_name
from starling.data.cache.pixel_folder import CACHE_FOLDER
from starling.device import Compute, select_compute
from starling.distributed.group import SINGLE, Group, Rank, joined
from starling.distributed.relaunch import relaunch
from starling.errors import Pruned, Stopped, is_out_of_memory
from starling.model.checkpoint import find_last, load_newest, require
from starling.model.defaults import hyp_file
from starling.model.detector import Detector
from starling.model.initial_weights import InitialWeights, check_freeze, find_initial_weights, read_weights
from starling.outputs.bucket import check_driver
from starling.outputs.run_dir import RunDir, create_run_dir, folder_below, run_lock, runs_root
from starling.prediction.predictor import fit_stride
from starling.progress import Progress, Silence, console, quiet
from starling.stop_signal import StopSignal
from starling.tracking.events import EventLog
from starling.tracking.process import DRAIN_S, STOPPED_DRAIN_S, Bridges, start_bridges
from starling.training.reporting import plots
from starling.training.reporting.delivery import deliver
from starling.training.reporting.hooks import Hook, Training, find_hooks
from starling.training.reporting.provenance import dataset_fields, keep_changes, origin_tags, place_tags
from starling.training.reporting.reporter import Reporter, RunLabel
from starling.training.reporting.results import EpochRow
from starling.training.resume.conditions import (
    SAVE_WAIT_S,
    DataDigests,
    conditions,
    differences_of_moved,
    notes_of_resume,
)
from starling.training.resume.ending import Ending, is_over, what_is_left, write_summary
from starling.training.resume.own_run import go_on
from starling.training.setup.anchors import AnchorFitter
from starling.training.setup.autobatch import choose_batch
from starling.training.setup.data import (
    DEVICE_SHARE,
    TrainingData,
    bring_to_device,
    load_data,
    report_findings,
    validation_loader,
)
from starling.training.setup.preflight import check_before_fetching
from starling.training.trainer import Diverged, Glances, Trainer, TrainResult

logger = logging.getLogger(__name__)

SETUP_STATE = ("config", "hyp", "layout", "run_uuid", "epoch", "names", "rows")
"""Entries of a resumable checkpoint that the setup of a resume reads."""


@dataclass(frozen=True, slots=True)
class TrainingSetup:
    """The objects that a worker sets up once and uses for all its trainings."""

    config: TrainConfig
    """The configuration, with the chosen batch size in place of `--batch -1`."""
    start: InitialWeights
    compute: Compute
    image_size: int
    data: TrainingData
    anchors: AnchorFitter | None
    """None under `--noautoanchor`."""
    group: Group = SINGLE
    """The processes that train one model together."""
    digests: DataDigests | None = None
    """Digests of the data files; None if this process writes no checkpoint."""

    def conditions(self, config: TrainConfig, wait_s: float | None = None) -> dict[str, Any]:
        """Return the conditions of a training that a checkpoint records; an empty mapping without digests.

        `wait_s` is how long to wait for the digests, as in `DataDigests.tables`.
        """
        if self.digests is None:
            return {}
        return conditions(config, self.compute, self.group.world_size, self.data, self.digests, wait_s)


def open_setup(config: TrainConfig, start: InitialWeights, hyp: Hyp, group: Group = SINGLE) -> TrainingSetup:
    """Choose the device and load the data; what can be wrong with either is found here."""
    compute = select_compute(
        group.device(config), config.amp, group.local_world_size, deterministic=config.deterministic
    )
    if config.sync_bn and compute.on_cpu:
        raise UsageError(
            "--sync-bn: torch synchronises BatchNorm between GPUs only; leave it out on the CPU, or train on GPUs"
        )
    several = f"{group.world_size} processes, each with a part of every batch; rank 0: "
    logger.info((several if group.world_size > 1 else "") + compute.describe())
    probe = InitialWeights(start.layout, None).build(("any",), None)
    check_freeze(probe, config.freeze)
    probe.head.build_loss(
        hyp, config.imgsz
    )  # hyperparameters of another head are refused before data are read
    image_size = fit_stride(config.imgsz, probe.image_multiple)
    if config.batch_size == AUTO_BATCH:
        config = replace(config, batch_size=choose_batch(probe, image_size, compute))
    data = load_data(
        config,
        image_size,
        runs_root() / CACHE_FOLDER,
        group.local_world_size,
        device_free_bytes=compute.image_bytes(DEVICE_SHARE.get(config.cache, 0.0)),
    )
    data = bring_to_device(data, compute)
    anchors = AnchorFitter(data.train, image_size=image_size, anchor_t=hyp.anchor_t, seed=config.seed)
    return TrainingSetup(
        config,
        start,
        compute,
        image_size,
        data,
        None if config.noautoanchor else anchors,
        group,
        DataDigests(data) if group.is_main else None,
    )


def read_hyp(config: TrainConfig) -> Hyp:
    """Return the hyperparameters that `--hyp`, `--close-mosaic` and `--label-smoothing` ask for."""
    path = hyp_file(config)
    values: dict[str, Any] = read_yaml(path)
    if config.label_smoothing:
        values["label_smoothing"] = config.label_smoothing
    if config.close_mosaic:
        values["close_mosaic"] = config.close_mosaic
    return Hyp.from_mapping(values, str(path))


def warn_of_idle(config: TrainConfig, hyp: Hyp, data: TrainingData) -> None:
    """Name what is set and does nothing."""
    if config.rect and hyp.mosaic:
        logger.warning(
            f"mosaic {hyp.mosaic:g} has no effect: --rect trains on whole images in their own shapes"
        )
    if hyp.close_mosaic and (config.rect or not hyp.mosaic):
        logger.warning("close_mosaic has no effect: this training shows no mosaics")
    if hyp.copy_paste and not data.train.polygons:
        logger.warning("copy_paste has no effect: no training label is a polygon")
    elif hyp.copy_paste and (config.rect or not hyp.mosaic):
        logger.warning("copy_paste has no effect: objects are pasted into mosaics only")
    if config.image_weights and (config.noval or config.evolve):
        said = "a search validates" if config.evolve else "--noval validates"
        logger.warning(f"--image-weights goes by the number of labels alone: {said} only the last epoch")


@dataclass(frozen=True, slots=True)
class _Job:
    """One requested training: a fresh one (`state` is None), or the resume of a checkpoint."""

    config: TrainConfig
    hyp: Hyp
    start: InitialWeights
    run_uuid: str
    folder: Path | None
    """The folder of the run to resume; None for a new run."""
    state: dict[str, Any] | None
    left: Ending = Ending.TRAINING
    moved: bool = False
    """Whether `--data` names another place for the data of the run to resume."""


def train(command: TrainCommand) -> None:
    """Train once, or resume an interrupted training: as a single process, or as one of several."""
    place = Rank.from_environment()
    if place is None and (processes := _processes_asked(command)) > 1:
        code = relaunch(command.arguments, processes)
        if code:
            raise SystemExit(code)  # the processes have printed the reason
        return
    progress = console()
    command = go_on(command, read_hyp)
    hooks = None if command.config.resume else find_hooks(command.config.hooks)
    job = _resumed_job(command) if command.config.resume else _fresh_job(command.config)
    hooks = find_hooks(job.config.hooks) if hooks is None else hooks
    with joined(job.config, place) as group:
        _check_same_state(job, group)
        if group.from_main(job.left) in (Ending.DELIVERING, Ending.WHOLE):
            if group.is_main:
                _end_again(job)
            return
        setup = _open_for(job, group)
        try:
            if group.is_main:
                _lead(job, setup, progress, hooks)
            else:
                _follow(job, setup)
        finally:
            if setup.digests is not None:
                setup.digests.cancel()


def _processes_asked(command: TrainCommand) -> int:
    """Return how many processes `--device` asks for; a resume without `--device` uses the run's devices."""
    config = command.config
    if config.resume and "device" not in command.given:
        with quiet():
            state, _ = load_newest(find_last(config.resume))
        config = TrainConfig.from_mapping(state.get("config", {}))
    return len(config.devices)


def _open_for(job: _Job, group: Group) -> TrainingSetup:
    """Open the setup of a job. For a resume, what is wrong with the data is told with the flag that mends it."""
    try:
        setup = open_setup(job.config, job.start, job.hyp, group)
    except DataError as error:
        if job.folder is None or job.moved:
            raise
        raise type(error)(
            f"{error}. If the data of this run has moved, name its new description: "
            f"--resume {RunDir(job.folder).last} --data NEW.yaml"
        ) from None
    if job.moved:
        problem = group.from_main(_difference_of_moved(job, setup) if group.is_main else "")
        if problem:
            raise DataError(
                f"--data {job.config.data}: not the data that {job.folder} was trained on: {problem}; name a description "
                f"of that data, or start a new run from its weights with --weights {RunDir(job.folder or Path()).last}"
            )
    return setup


def _difference_of_moved(job: _Job, setup: TrainingSetup) -> str:
    """Return how the data of a resume differ from the data of the checkpoint; an empty string for equal data."""
    assert job.state is not None, "there is a checkpoint to resume"
    names = tuple(job.state["names"])
    if names != setup.data.names:
        return f"the run has the classes {', '.join(names)}, the data {', '.join(setup.data.names)}"
    assert setup.digests is not None, "asked on rank 0"
    return "; ".join(differences_of_moved(job.state.get("conditions"), setup.digests))


def _check_same_state(job: _Job, group: Group) -> None:
    """Raise CheckpointError if this rank would resume from another state than rank 0."""
    own = (
        None if job.state is None else [str(job.folder), *(job.state[key] for key in ("epoch", "iteration"))]
    )
    main = group.from_main(own)
    if own != main:
        raise CheckpointError(
            f"--resume found {own} (folder, epoch, iteration) here and {main} on rank 0; "
            "give every node the same last.pt by its path"
        )


def _follow(job: _Job, setup: TrainingSetup) -> None:
    """Train as one of the ranks that neither print nor write."""
    run = RunDir(setup.group.from_main(job.folder or Path()))
    label = RunLabel(job.run_uuid, job.config.run_project, run.path.name)
    with StopSignal() as stop:
        silent = Reporter(label, run.path, progress=Silence())
        train_in(setup, setup.config, job.hyp, run, silent, stop, job.state)


def _lead(job: _Job, setup: TrainingSetup, progress: Progress, hooks: Mapping[str, Sequence[Hook]]) -> None:
    """Train as a single process or as rank 0: with a run folder, trackers and lines for people."""
    config = setup.config
    warn_of_idle(config, job.hyp, setup.data)
    run = RunDir(job.folder or _new_run(config))
    with run_lock(run.path), StopSignal() as stop:
        setup.group.from_main(run.path)
        _sweep(run)
        if job.state is None:
            remove(run.previous)  # with --exist-ok: of the training that was here before
        logger.info(f"run: {run.path}")
        report_findings(setup.data, run.path)
        log = EventLog(run.events, job.run_uuid)
        bridges = start_bridges(log)
        status = WorkerStatus(runs_root(), worker_name(), logger.warning)
        label = RunLabel(job.run_uuid, config.run_project.removeprefix("runs/"), run.path.name)
        reporter = Reporter(label, run.path, progress=progress, status=status, events=log,
                            memory_bytes=setup.compute.memory_bytes, hooks=hooks)  # fmt: skip
        try:
            result = train_in(
                setup, config, job.hyp, run, reporter, stop, job.state, lambda row: bridges.check()
            )
        finally:
            finish_bridges(bridges, stop)
        deliver(config, run, result.rows, job.run_uuid)
        reporter.done()


def _end_again(job: _Job) -> None:
    """Do what is left of a run whose figures and plots are made and told: send, copy, and say how it ended."""
    assert job.folder is not None, "there is a run to resume"
    assert job.state is not None, "there is a checkpoint to resume"
    run, rows = RunDir(job.folder), [EpochRow.from_list(values) for values in job.state["rows"]]
    status = WorkerStatus(runs_root(), worker_name())
    with run_lock(run.path), StopSignal() as stop:
        _sweep(run)
        log = EventLog(run.events, job.run_uuid)
        if job.left is Ending.DELIVERING:
            finish_bridges(start_bridges(log), stop)
        deliver(job.config, run, rows, job.run_uuid, again=job.left is Ending.WHOLE)
        status.update(phase="done", run_dir=str(run.path))


def _sweep(run: RunDir) -> None:
    """Remove the temporary files of killed writers from the folders of a run."""
    for name in (".", run.weights.name, plots.BY_EPOCH_FOLDER):
        sweep(folder_below(run.path, name))


def _fresh_job(config: TrainConfig) -> _Job:
    hyp = read_hyp(config)
    check_before_fetching(config)
    return _Job(config, hyp, find_initial_weights(config.weights, config.cfg), uuid.uuid4().hex, None, None)


def _resumed_job(command: TrainCommand) -> _Job:
    """Read the checkpoint to go on from. Raises CheckpointError or UsageError where it is none to resume."""
    last = find_last(command.config.resume)
    state, taken = load_newest(last)
    if state.get("kind") != "resumable" or last.parent.name != "weights":
        raise CheckpointError(
            f"{last}: not the weights/last.pt of a run folder, so it cannot be resumed; "
            f"start a new run from it with --weights {last}"
        )
    require(taken, state, SETUP_STATE)
    config = command.resumed(TrainConfig.from_mapping(state["config"]))
    check_driver(config.bucket)
    folder, done = last.parent.parent, state["epoch"]
    name_top(folder.parent)
    name_top(folder)
    moved = config.data != state["config"].get("data")
    left = what_is_left(RunDir(folder), state, config)
    early = done < config.epochs
    if left is Ending.WHOLE and not command.goes_on:
        raise UsageError(
            f"{last}: stopped early after {done} epochs (--patience {config.patience}); go on with a larger --patience, "
            "or 0 for none"
            if early
            else f"{last}: all {done} epochs are done; go on with a larger --epochs"
        )
    if left is Ending.TRAINING:
        logger.info(f"resuming {folder} at epoch {done + 1}/{config.epochs}, from {taken.name}")
    else:
        over = f"stopped early after {done} epochs" if early else f"all {done} epochs are done"
        logger.info(f"finishing {folder}: {over}, from {taken.name}")
    hyp = Hyp.from_mapping(state["hyp"], str(last))
    return _Job(
        config, hyp, InitialWeights(state["layout"], None), state["run_uuid"], folder, state, left, moved
    )


def train_in(
    setup: TrainingSetup,
    config: TrainConfig,
    hyp: Hyp,
    run: RunDir,
    reporter: Reporter,
    stop: StopSignal,
    state: Mapping[str, Any] | None = None,
    on_epoch: Callable[[Any], None] = lambda row: None,
    recover: bool = True,
    glances: Glances | None = None,
) -> TrainResult:
    """Train in `run` with the objects of the setup, and report the end of the run in any case, even after an error."""
    _tell_start(setup, config, hyp, run, reporter)
    try:
        torch.manual_seed(config.seed)  # draws the first weights; the data draws from (seed, epoch, index)
        detector = _build_detector(setup, hyp, state)
        trainer = Trainer(config, hyp, detector, setup.data, run, image_size=setup.image_size,
                          compute=setup.compute, reporter=reporter, stop=stop, on_epoch=on_epoch,
                          glances=glances, rollbacks=int(recover), back_off=recover, group=setup.group,
                          conditions=lambda: setup.conditions(config, SAVE_WAIT_S))  # fmt: skip
        if state is not None:
            trainer.restore(dict(state))
            if setup.digests is not None:
                exact = setup.compute.on_cpu or config.deterministic
                now = setup.conditions(config)
                trains = not is_over(trainer.rows, trainer.epoch, config)
                trainer.notes = notes_of_resume(state, now, exact_kernels=exact, trains=trains)
        with setup.group.watch():
            result = trainer.fit()
    except Stopped as error:
        reporter.ended("killed", f"{error}; resume with --resume {run.last}")
        raise
    except Pruned as error:
        reporter.ended("pruned", str(error))
        raise
    except StarlingError as error:
        reporter.ended("failed", str(error), lasting=isinstance(error, Diverged))
        raise
    except BaseException as error:
        reporter.ended("failed", f"{type(error).__name__}: {error}", lasting=is_out_of_memory(error))
        raise
    finally:
        setup.group.training_is_over()
    if setup.group.is_main and reporter.label.parent is None:
        write_summary(run, result.rows, reporter.label.uuid, trainer.notes, **setup.data.account())
    reporter.ended("finished", best=result.best)
    return result


def _tell_start(setup: TrainingSetup, config: TrainConfig, hyp: Hyp, run: RunDir, reporter: Reporter) -> None:
    """Report the start: parameters, datasets and version of the code."""
    if setup.group.is_main:
        keep_changes(run)
    data = setup.data
    tags = {
        "device": setup.compute.describe(),
        **origin_tags(config, data.train),
        **place_tags(),
    }
    reporter.started(_params(config, hyp), tags, dataset_fields(config, data.train, data.val))
    reporter.offer_hooks(Training(args=config, hyp=hyp, run=run, device=setup.compute.device))
    reporter.hook("on_pretrain_routine_start")


def _build_detector(setup: TrainingSetup, hyp: Hyp, state: Mapping[str, Any] | None) -> Detector:
    """Return the detector to train: fresh, with anchors that fit the labels, or as the checkpoint describes it."""
    if state is not None:  # its layout holds the anchors it was trained with
        return InitialWeights(state["layout"], None).build(setup.data.names, None)
    detector = setup.start.build(setup.data.names, hyp.anchors)
    if setup.anchors is not None:
        provisional = setup.start.anchors_are_provisional(hyp.anchors)
        setup.anchors.fit(detector, provisional=provisional)
    return detector


def draw_weights(setup: TrainingSetup, weights: Path, folder: Path) -> None:
    """Validate finished weights and draw the result: validation batches, curves, confusion matrix."""
    trained = read_weights(weights)
    initial = InitialWeights(trained.layout or setup.start.layout, trained)
    with quiet():  # they are not what a training begins with
        detector = initial.build(setup.data.names, None)
    model = detector.to(setup.compute.device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    batches = validation_loader(setup.data, detector, setup.config, setup.image_size, setup.compute)
    plots.draw_final(model, batches, setup.data, setup.compute, folder)


def finish_bridges(bridges: Bridges, stop: StopSignal) -> None:
    """Let the bridges drain; only briefly after a stop signal, because a container's grace period is short."""
    bridges.finish(STOPPED_DRAIN_S if stop.requested else DRAIN_S)


def _new_run(config: TrainConfig) -> Path:
    return create_run_dir(config.run_project, config.run_name, runs_root(), exist_ok=config.exist_ok)


def _params(config: TrainConfig, hyp: Hyp) -> dict[str, Any]:
    return {**config.as_dict(), **{f"hyp/{key}": value for key, value in hyp.as_dict().items()}}
