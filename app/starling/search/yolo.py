"""The `CandidateTrainer` of YOLO detectors: a worker sets up data and device once for all its candidates."""

from __future__ import annotations

import logging
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from starling.config.hyp import Hyp
from starling.config.shipped import find_config
from starling.config.yaml_reader import read_yaml
from starling.core.errors import CheckpointError, UsageError
from starling.core.files.safe_open import names_in, remove, remove_tree
from starling.core.settings.train import TrainConfig
from starling.errors import is_out_of_memory
from starling.model.checkpoint import load_newest, require
from starling.model.detector import Detector
from starling.model.initial_weights import InitialWeights, check_freeze, find_initial_weights
from starling.outputs.run_dir import RunDir
from starling.prediction.predictor import fit_stride
from starling.search.outcome import Candidate, CandidateFailed, Outcome, Report, SearchProgress
from starling.search.reporting import SearchReporter
from starling.search.space import Space
from starling.search.space_file import changed
from starling.search.study import SearchStudy
from starling.search.winner import keep_best_weights
from starling.search.worker import CandidateTrainer, failure_reason
from starling.stop_signal import StopSignal
from starling.tracking.process import Bridges
from starling.training.reporting.results import EpochRow
from starling.training.trainer import Diverged, Glances, TrainResult
from starling.training.training import SETUP_STATE, TrainingSetup, open_setup, train_in

logger = logging.getLogger(__name__)


class YoloTrainer(CandidateTrainer):
    """Trains candidates of one search, with setups that are kept between candidates."""

    def __init__(
        self,
        study: SearchStudy,
        config: TrainConfig,
        setups: TrainingSetups,
        reporter: SearchReporter,
        bridges: Bridges,
        stop: StopSignal,
    ) -> None:
        self._study, self._config, self._setups = study, config, setups
        self._reporter, self._bridges, self._stop = reporter, bridges, stop

    def train(self, candidate: Candidate, report: Report) -> Outcome:
        """Train one candidate. Raises CandidateFailed if the loss diverged or memory ran out."""
        try:
            return _outcome(self._train_run(candidate, report))
        except Exception as error:
            reason = _own_failure(error)
            if reason is None:
                raise
        # Raised outside the except block, so that the error keeps no frames and no tensors of the training alive.
        raise CandidateFailed(reason)

    def _train_run(self, candidate: Candidate, report: Report) -> TrainResult:
        """Train in the candidate's folder, from the checkpoint of an interrupted attempt if there is one."""
        setup = self._setups.of(candidate.settings)
        config = changed(self._config, candidate.settings)
        if candidate.train_seed is not None:
            config = replace(config, seed=candidate.train_seed)
        state = _newest_state(candidate)
        run, run_uuid = RunDir(candidate.directory), state["run_uuid"] if state else uuid.uuid4().hex
        hyp = Hyp.from_mapping(candidate.hyp, f"candidate {candidate.number}")

        def on_epoch(row: EpochRow) -> None:
            report()
            self._bridges.check()

        with self._reporter.of_candidate(candidate, run_uuid, setup.compute.memory_bytes) as reporter:
            # No recovery: a candidate that needs a lower rate or smaller batches is not the requested one.
            result = train_in(
                setup, config, hyp, run, reporter, self._stop, state, on_epoch, recover=False,
                glances=Glances(candidate.glances, report),
            )  # fmt: skip
        if candidate.finalist_of is None:
            keep_best_weights(self._study.directory, run, result.best.fitness)
        return result

    def ended(self, candidate: Candidate) -> None:
        """Remove the checkpoints of an ended candidate, and those of its interrupted attempts.

        A finalist's weights stay until the winner is known.
        """
        run = RunDir(candidate.directory)
        if candidate.finalist_of is None:
            remove_tree(run.weights)
        else:
            for checkpoint in (run.last, run.previous):
                remove(checkpoint)
        for folder in candidate.resumes_from:
            # The folder stays: a worker that was frozen in a save may wake up, and must fail at its lease instead.
            weights = RunDir(folder).weights
            for name in names_in(weights):
                if name.endswith(".pt"):
                    remove(weights / name)

    def progressed(self, progress: SearchProgress, candidate: Candidate | None) -> None:
        """Report the progress of the search and this worker's candidate to launcher and trackers."""
        self._reporter.progressed(progress, candidate)


def _own_failure(error: Exception) -> str | None:
    """Return why a candidate failed, with the remedy, if the candidate itself caused the failure, else None."""
    if isinstance(error, Diverged):
        return str(error)
    if is_out_of_memory(error):
        return f"{failure_reason(error)}; lower --batch or --imgsz"
    return None


def _outcome(result: TrainResult) -> Outcome:
    names = ("precision", "recall", "map50", "map5095", *(f"{name}_loss" for name in result.best.losses))
    values = (*result.best.metrics, *result.best.val_losses)
    metrics = {name: float(value) for name, value in zip(names, values, strict=True)}
    return Outcome(fitness=result.best.fitness, metrics=metrics)


def _newest_state(candidate: Candidate) -> Mapping[str, Any] | None:
    """Return the checkpoint of an interrupted attempt at this candidate, if one is whole."""
    for folder in candidate.resumes_from:
        try:
            state, _ = load_newest(RunDir(folder).last)
            require(RunDir(folder).last, state, SETUP_STATE)
            return state
        except CheckpointError as error:
            if RunDir(folder).last.exists():
                logger.warning(f"{error}; not taken")
    return None


class TrainingSetups:
    """The setups for candidates' settings: the usual one, and others that share its data if possible.

    Decoded images depend on the image size. Images in a shared mapped file are kept for every requested size; images in
    the memory of this process or its GPU are kept only for the latest size, because two sizes would not fit.
    """

    def __init__(self, config: TrainConfig, hyp: Hyp) -> None:
        """Open the usual setup; what can be wrong with device or data is found here."""
        self._hyp = hyp
        usual = open_setup(config, find_initial_weights(config.weights, config.cfg), hyp)
        self._config = usual.config
        self._held = {self._key(usual.config): usual}

    @property
    def usual(self) -> TrainingSetup:
        """The setup of the worker's command line, with the chosen batch size in place of `--batch -1`."""
        return self.of({})

    def of(self, settings: Mapping[str, int | str]) -> TrainingSetup:
        """Return the usual setup with `settings`, fields of TrainConfig, changed."""
        config = changed(self._config, settings)
        key = self._key(config)
        if key not in self._held:
            self._held[key] = self._open(config)
        return replace(self._held[key], config=config)

    @staticmethod
    def _key(config: TrainConfig) -> tuple[int, str]:
        return config.imgsz, config.cfg

    def _open(self, config: TrainConfig) -> TrainingSetup:
        start = find_initial_weights(config.weights, config.cfg)
        size = fit_stride(config.imgsz, image_multiple(start))
        alike = next((setup for setup in self._held.values() if setup.image_size == size), None)
        if alike is not None:
            return replace(alike, config=config, start=start)
        self._held = {key: setup for key, setup in self._held.items() if _is_mapped(setup)}
        return open_setup(config, start, self._hyp)


def _is_mapped(setup: TrainingSetup) -> bool:
    """Return whether the decoded images take no memory of this process or its GPU."""
    stores = (setup.data.train_images, setup.data.val_images)
    return all(store.mode == "disk" and not store.on_device for store in stores)


def image_multiple(start: InitialWeights) -> int:
    """Return the number of pixels that a layout's image sides are a multiple of; raises UsageError for a bad layout."""
    return _probe(start).image_multiple


def _probe(start: InitialWeights) -> Detector:
    return InitialWeights(start.layout, None).build(("any",), None)


def check_layouts(space: Space, config: TrainConfig, hyp: Hyp) -> None:
    """Build every searched layout once; raises UsageError with the name of a layout that cannot be built."""
    for choice in (c for s in space.settings if s.name == "cfg" for c in s.choices):
        try:
            probe = _probe(find_initial_weights(config.weights, str(choice)))
            check_freeze(probe, config.freeze)
            probe.head.build_loss(hyp, config.imgsz)
        except UsageError as error:
            raise UsageError(f"{config.space}: cfg: {choice}: {error}") from None


def searched_layouts(space: Space) -> dict[str, str]:
    """Return a digest of every searched layout: files of equal name on two workers may differ."""
    choices = [str(choice) for s in space.settings if s.name == "cfg" for choice in s.choices]
    return {choice: layout_digest(read_yaml(find_config("layouts", choice))) for choice in choices}


def layout_digest(layout: Mapping[str, Any]) -> str:
    """Return eight hexadecimal digits; different layouts have different digits."""
    return f"{zlib.crc32(repr(layout).encode()):08x}"
