"""The training loop: `restore, then for each epoch fit, score, save`."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from starling.config.hyp import Hyp
from starling.config.yaml_reader import write_yaml
from starling.core.errors import CheckpointError, StarlingError
from starling.core.settings.train import TrainConfig
from starling.data.loader.loader import Batch
from starling.device import Compute
from starling.distributed.group import SINGLE, Group
from starling.errors import Stopped
from starling.evaluation.plots import PREVIEWS
from starling.evaluation.validator import Validation, class_table, validate
from starling.model.checkpoint import load_checkpoint, require
from starling.model.detector import Detector
from starling.model.initial_weights import frozen_layers
from starling.model.weights import load_weights
from starling.outputs.run_dir import DIFF, RunDir
from starling.stop_signal import StopSignal
from starling.training.checkpoint import Saver, kept_row
from starling.training.learner import Learner, LossWatch, is_finite
from starling.training.optimizer import (
    BIASES,
    DECAYED,
    NORMS,
    ExponentialMovingAverage,
    Schedule,
    build_optimizer,
)
from starling.training.reporting import plots
from starling.training.reporting.reporter import Reporter
from starling.training.reporting.results import EpochRow, fitness, write_results
from starling.training.resume.ending import is_over
from starling.training.setup.compiling import CompiledForward
from starling.training.setup.data import TrainingData, training_loader, validation_loader

logger = logging.getLogger(__name__)

GRADIENT_NORM = 10.0
ROLLBACK_RATE = 0.1
"""Factor by which a rollback multiplies the learning rate."""
NOT_VALIDATED = (math.nan,) * 4
FIRST_FILES = ("opt.yaml", "hyp.yaml", DIFF, *plots.LABELS)
"""Files of a run directory that trackers get before the first iteration."""
TRAINER_STATE = (
    *("names", "model", "ema", "ema_updates", "optimizer", "gradients"),
    *("epoch", "iteration", "last_step", "loss_sum", "rows", "rate_scale", "rollbacks_left", "parts"),
)
"""Entries of a resumable checkpoint that the trainer reads."""


class Diverged(StarlingError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The result of a finished training: the rows of all epochs, and the row with the highest fitness."""

    rows: list[EpochRow]
    best: EpochRow
    images: int
    """Number of images that went through forward and backward."""


@dataclass(frozen=True, slots=True)
class Glances:
    """Validations between epochs for a search only: they do not choose the best weights and add nothing to a row."""

    epochs: Container[int]
    """Numbers of done epochs after which a validation takes place."""
    tell: Callable[[int, float], None]
    """Takes the number of done epochs and the fitness; an exception that it raises ends the training."""


class Trainer:
    """Train one detector. `state()` holds all that a resume needs; the rest follows from epoch and iteration."""

    def __init__(
        self,
        config: TrainConfig,
        hyp: Hyp,
        detector: Detector,
        data: TrainingData,
        run: RunDir,
        *,
        image_size: int,
        compute: Compute,
        reporter: Reporter,
        stop: StopSignal,
        on_epoch: Callable[[EpochRow], None] = lambda row: None,
        glances: Glances | None = None,
        rollbacks: int = 1,
        back_off: bool = True,
        clock: Callable[[], float] = time.monotonic,
        group: Group = SINGLE,
        conditions: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """Prepare a fresh training.

        `conditions` returns the conditions that a checkpoint records, see `starling.training.resume.conditions`.

        `rollbacks` is how often training goes back to the last good state after a loss of NaN or infinity; `back_off`
        allows a batch that does not fit into memory to be split, which several processes cannot: they stay in step.
        """
        self.config, self.hyp, self.data, self.run, self.compute = config, hyp, data, run, compute
        self._reporter, self._stop, self._on_epoch, self._glances = reporter, stop, on_epoch, glances
        self._image_size, self._group = image_size, group
        self._conditions = conditions
        self.notes: list[str] = []
        """Notes of the resumes of this training: what kept each from being bit-equal."""
        if config.sync_bn:
            detector = nn.SyncBatchNorm.convert_sync_batchnorm(detector)
        self.model = detector.to(compute.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        _freeze(self.model, config.freeze)
        forward = group.wrap(self.model, compute)
        if config.compile:
            forward = CompiledForward(forward, compute)
        self._statistics = _running_statistics(self.model)
        self.average = ExponentialMovingAverage(self.model)
        self.optimizer = build_optimizer(self.model, config.optimizer, hyp, config.batch_size)
        self.loss = self.model.head.build_loss(hyp, image_size)
        self._learner = Learner(forward, self.loss, self.optimizer, compute, group, back_off=back_off)
        self.loader = training_loader(data, detector, config, hyp, image_size, compute, group)
        self.val_loader = validation_loader(data, detector, config, image_size, compute, group)
        self.schedule = Schedule(hyp, config.epochs, len(self.loader), config.batch_size, config.cos_lr)
        self.epoch = 0
        self.iteration = 0
        """Number of done iterations of this epoch."""
        self.rows: list[EpochRow] = []
        self._images_in_epoch = 0
        self._last_step = -1
        self._loss_sum = torch.zeros(3, device=compute.device)
        self._watch = LossWatch(compute.device)
        self._rollbacks_left = rollbacks
        self._rate_scale = 1.0
        """Factor of all learning rates; below 1 after a rollback."""
        self._beginning: dict[str, Any] | None = None
        self._ahead: Iterator[Batch] | None = None
        """The next epoch's batches, where the loader has begun them."""
        self._saver = Saver(config, run, self.state, self.weights, writes=group.is_main, clock=clock)

    def fit(self) -> TrainResult:
        """Train to the last epoch, or until patience runs out.

        Raises Stopped after a signal, once the checkpoint is saved; Diverged if the loss becomes NaN or infinite; and
        any exception of `on_epoch`.
        """
        self._begin()
        self._reporter.hook("on_train_start", epoch=self.epoch)
        while not is_over(self.rows, self.epoch, self.config):
            self._reporter.epoch_began()
            self._reporter.hook("on_train_epoch_start", epoch=self.epoch)
            self._fit_epoch()
            if self._has_diverged():
                self._roll_back()
                continue
            self._score_epoch()
            if self.epoch < self.config.epochs:
                self._stop_if_asked()
        if self.epoch < self.config.epochs:
            logger.info(
                f"stopped early: no better fitness for {self.config.patience} epochs (--patience {self.config.patience})"
            )
        return self._finish()

    def _begin(self) -> None:
        if not self._group.is_main:
            return
        write_yaml(self.run.path / "hyp.yaml", self.hyp.as_dict())
        write_yaml(self.run.path / "opt.yaml", self.config.as_dict())
        if not self.config.noplots and self.epoch == 0:
            plots.draw_labels(self.data.train, self.run.path)
        if self.rows:  # results.csv may lack the last row after a kill, or belong to another worker
            write_results(self.run.results_csv, self.rows)
            self._reporter.goes_on_after(self.rows[-1])
        self._reporter.appeared(*(self.run.path / name for name in FIRST_FILES))
        self._reporter.hook("on_pretrain_routine_end", model=self.model)
        if self._rollbacks_left and self.epoch == self.iteration == 0:
            self._beginning = copy.deepcopy(self.state())

    def _fit_epoch(self) -> None:
        self.model.train()
        images = 0
        epoch_start = self.epoch * len(self.loader)
        for batch in self._batches():
            if self.epoch == 0 and self.iteration < PREVIEWS and self._draws:
                path = self.run.path / f"train_batch{self.iteration}.jpg"
                plots.draw_train_batch(batch, self.data.train, path)
                self._reporter.appeared(path)
            self._reporter.hook("on_train_batch_start")
            self._iterate(batch, epoch_start + self.iteration)
            self.iteration += 1
            images += batch.whole
            self._reporter.hook("on_train_batch_end")
            self._reporter.iteration(
                self.epoch, self.config.epochs, self.iteration, len(self.loader), images, self._named_losses
            )
            if self._last_step == epoch_start + self.iteration - 1:
                self._after_step()
        self._images_in_epoch = images

    def _batches(self) -> Iterator[Batch]:
        """Return the remaining batches of this epoch; the last validation may have begun to load them."""
        batches, self._ahead = self._ahead, None
        if batches is None or self.iteration:
            batches = self.loader.epoch(self.epoch, start=self.iteration)
        return batches

    def _begin_next(self) -> None:
        """Let the loader prepare the next epoch's first batches during the validation."""
        if not self.config.image_weights:  # image weights depend on the result of the validation
            self._ahead = self.loader.epoch(self.epoch + 1)

    @property
    def _draws(self) -> bool:
        return self._group.is_main and not self.config.noplots

    def _after_step(self) -> None:
        due, signum = self._group.highest(self._saver.due(), self._stop.signum or 0)
        if not (due or signum) or self._has_diverged():
            return  # a diverged state is never saved; the rollback follows at the end of the epoch
        if due:
            self._saver.save_last((self.epoch, self.iteration))
        self._stop_if_asked()  # again after the save: a signal may have come during the save

    def _after_validated(self, images: int) -> None:
        self._stop_if_asked()  # a resume repeats this validation

    def _stop_if_asked(self) -> None:
        (signum,) = self._group.highest(self._stop.signum or 0)
        if signum:
            self._stop_here(signum)

    def _stop_here(self, signum: int) -> None:
        """Save, even with `--nosave`, and raise Stopped on all ranks."""
        if self._saver.saved != (self.epoch, self.iteration):  # the grace period is short: one save is enough
            self._saver.save_last((self.epoch, self.iteration))
        self._group.barrier()  # a rank that left before the save is done would make torchrun kill the saving rank
        raise Stopped(signum)

    def _has_diverged(self) -> bool:
        """Return whether any rank has had a NaN or infinite loss in this epoch, or has such a weight now."""
        (bad,) = self._group.highest(self._watch.first_bad() is not None or not is_finite(self.model))
        return bool(bad)

    def _roll_back(self) -> None:
        """Go back to the last good state with a tenth of the learning rate; raise Diverged if no rollback is left."""
        position = self._watch.first_bad()
        step = self.epoch * len(self.loader) + self.iteration - 1 if position is None else position
        where = f"epoch {self.epoch + 1}, iteration {step}"
        if not self._rollbacks_left:
            raise Diverged(
                f"{where}: the loss is no longer a number; lower lr0 (now {self.hyp.lr0 * self._rate_scale:g}) or "
                "check the labels. The checkpoints on disk are intact"
            )
        left, scale = self._rollbacks_left - 1, self._rate_scale * ROLLBACK_RATE
        self.restore(self._group.from_main(self._last_good_state() if self._group.is_main else {}))
        self._rollbacks_left, self._rate_scale = left, scale
        logger.warning(
            f"{where}: the loss is no longer a number; going on from epoch {self.epoch + 1}, iteration "
            f"{self.epoch * len(self.loader) + self.iteration}, with the learning rate times {scale:g}"
        )

    def _last_good_state(self) -> dict[str, Any]:
        """Return the state in `last.pt` if it belongs to this run; otherwise the state at the beginning of the run."""
        if self.run.last.is_file():
            state = load_checkpoint(self.run.last)
            if state["run_uuid"] == self._reporter.label.uuid:
                return state
        assert self._beginning is not None, "a run that began here remembers how"
        return self._beginning

    def _iterate(self, batch: Batch, position: int) -> None:
        """Run one batch forward and backward, and take an optimizer step if enough batches are accumulated."""
        self.schedule.apply(self.optimizer, self.epoch, position, self._rate_scale)
        parts = self._learner.parts
        losses = self._group.sum(self._learner.learn(batch))
        if self._learner.parts != parts:
            self._last_step = position - 1  # the accumulated gradients are lost: accumulate a whole step anew
        self._watch.look(losses.sum(), position)
        self._loss_sum += losses
        self._group.average(self._statistics)
        if position - self._last_step >= self.schedule.accumulate(position):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.average.update()
            self._last_step = position

    def _mean_losses(self) -> tuple[float, float, float]:
        first, second, third = (self._loss_sum / max(self.iteration, 1)).tolist()
        return first, second, third

    def _named_losses(self) -> dict[str, float]:
        return dict(zip(self.model.head.losses, self._mean_losses(), strict=True))

    def _score_epoch(self) -> None:
        """Validate if the epoch is to be validated, record the row, save, and report."""
        losses = self._mean_losses()
        self._reporter.hook("on_train_epoch_end")
        last = self.epoch + 1 == self.config.epochs
        validation = None
        if last or not self.config.noval:
            if not last:
                self._begin_next()
            validation = self._validate()
            self.loader.class_maps = validation.metrics.map_by_class(self.model.nc).tolist()
        row = self._row(losses, validation)
        best = self._saver.is_best(row)
        self.rows.append(row)
        self.epoch, self.iteration = self.epoch + 1, 0
        self._loss_sum.zero_()
        if self._group.is_main:
            write_results(self.run.results_csv, self.rows)
        kept = self._saver.save_epoch(row, best=best, last=last)
        self._reporter.hook("on_model_save", epoch=row.epoch)
        self._reporter.saved(row, kept, self.run.best if best else None)
        self._reporter.epoch_ended(row, self.config.epochs, self._images_in_epoch, best)
        self._on_epoch(row)
        if self._glances is not None and self.epoch in self._glances.epochs and not last:
            metrics = (self._validate() if validation is None else validation).metrics
            self._glances.tell(self.epoch, fitness(metrics.map50, metrics.map5095))

    def _validate(self) -> Validation:
        self._reporter.hook("on_val_start")
        shown = self._draws and plots.is_shown(self.epoch, self.config)
        validation = validate(
            self.average.model,
            self.val_loader,
            self.loss,
            self.compute,
            previews=int(shown),
            after_batch=self._after_validated,
            group=self._group,
        )
        if shown:
            path = plots.draw_epoch(validation, self.data.val, self.run.path, self.epoch)
            self._reporter.image(path, plots.BY_EPOCH, self.epoch)
        self._reporter.hook("on_val_end")
        return validation

    def _row(self, losses: tuple[float, float, float], validation: Validation | None) -> EpochRow:
        metrics, val_losses = NOT_VALIDATED, NOT_VALIDATED[:3]
        if validation is not None:
            metrics, val_losses = _scores(validation).values()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return EpochRow(
            self.epoch,
            losses,
            metrics,
            val_losses,
            (rates[BIASES], rates[DECAYED], rates[NORMS]),
            self.model.head.losses,
        )

    @property
    def best(self) -> EpochRow:
        """The validated row with the highest fitness, the newest of equal ones; the last row if none was validated."""
        return kept_row(self.rows)

    # --- state ------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Any]:
        """Return the checkpoint for inference and fine-tuning: the averaged weights in half precision."""
        # Anchors keep full precision: they must equal the anchors in the layout.
        half = {
            key: value.half() if value.is_floating_point() and not key.endswith("anchors") else value
            for key, value in self.average.model.state_dict().items()
        }
        return {"kind": "weights", "ema": half, **self._description()}

    def state(self) -> dict[str, Any]:
        """Return everything that `restore` needs to go on exactly from here."""
        gradients = {
            key: parameter.grad
            for key, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }
        return {
            "kind": "resumable",
            "ema": self.average.model.state_dict(),
            "ema_updates": self.average.updates,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "gradients": gradients,  # from iterations since the last step; an epoch may end between two steps
            "epoch": self.epoch,
            "iteration": self.iteration,
            "last_step": self._last_step,
            "loss_sum": self._loss_sum,
            "rate_scale": self._rate_scale,
            "parts": self._learner.parts,
            "rollbacks_left": self._rollbacks_left,
            "class_maps": self.loader.class_maps,
            "conditions": self._conditions(),
            "notes": self.notes,
            **self._description(),
        }

    def _description(self) -> dict[str, Any]:
        return {
            "layout": self.model.layout,
            "names": list(self.data.names),
            "image_size": self._image_size,
            "hyp": self.hyp.as_dict(),
            "config": self.config.as_dict(),
            "run_uuid": self._reporter.label.uuid,
            "rows": [row.as_list() for row in self.rows],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a state that `state()` returned. Raises CheckpointError if it belongs to other data or settings."""
        require(self.run.last, state, TRAINER_STATE)
        if tuple(state["names"]) != self.data.names:
            raise CheckpointError(
                f"the checkpoint was trained on the classes {', '.join(state['names'])}, "
                f"the dataset has {', '.join(self.data.names)}; resume with the dataset it was trained on"
            )
        for model, tensors in ((self.model, state["model"]), (self.average.model, state["ema"])):
            load_weights(model, tensors, source=str(self.run.last))
        self.average.updates = state["ema_updates"]
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{self.run.last}: the optimizer's state does not fit ({error})") from None
        for key, parameter in self.model.named_parameters():
            gradient = state["gradients"].get(key)
            parameter.grad = None if gradient is None else gradient.to(parameter, copy=True)
        self.epoch, self.iteration = state["epoch"], state["iteration"]
        self._last_step = state["last_step"]
        self._loss_sum.copy_(state["loss_sum"])
        self._rate_scale, self._rollbacks_left = state["rate_scale"], state["rollbacks_left"]
        self._learner.parts = state["parts"]
        self._watch.reset()
        self.loader.class_maps = state.get("class_maps")
        self.rows = [EpochRow.from_list(values, self.model.head.losses) for values in state["rows"]]
        self._saver.restored(self.rows, (self.epoch, self.iteration))

    # --- the end ----------------------------------------------------------------------------------------

    def _finish(self) -> TrainResult:
        self._ahead = None  # after an early stop nobody reads the batches
        self._end_saved()
        self._saver.finish()
        if not self.config.noplots:
            if self._draws:
                plots.draw_results(self.run.results_csv, self.run.path / "results.png", self.best.epoch)
            validation = plots.draw_final(
                self._best_model(), self.val_loader, self.data, self.compute, self.run.path, self._group
            )
            self._say_classes(validation)
        self._reporter.hook("on_train_end")
        return TrainResult(self.rows, self.best, len(self.data.train.images) * len(self.rows))

    def _end_saved(self) -> None:
        """Validate and save the last epoch, if the training ended sooner than planned."""
        trained_here = self._saver.began != (self.epoch, self.iteration)
        if not (trained_here or any(row.validated for row in self.rows)):  # a resume has lowered --epochs
            validation = self._validate()
            self.rows[-1] = replace(self.rows[-1], **_scores(validation))
            if self._group.is_main:
                write_results(self.run.results_csv, self.rows)
            self.iteration = 0
            self._saver.save_epoch(self.rows[-1], best=self.rows[-1].validated, last=True)
        elif trained_here and self._saver.saved != (self.epoch, self.iteration):  # --nosave and an early stop
            self._saver.save_last((self.epoch, self.iteration))

    def _best_model(self) -> Detector:
        """Return the detector with the averaged weights of the best epoch."""
        from starling.model.initial_weights import read_weights

        model = self.average.model
        if self._group.is_main and self.run.best.is_file() and self.best.epoch != self.epoch - 1:
            model.load_state_dict(read_weights(self.run.best).state)
        self._group.copy_from_main(model.state_dict().values())
        return model

    def _say_classes(self, validation: Validation) -> None:
        """Print the best epoch's figures for all classes and for each."""
        logger.info(f"best epoch: {self.best.epoch + 1}")
        for line in class_table(validation.metrics, self.data.val.distinct_names):
            logger.info(line)


def _running_statistics(model: nn.Module) -> list[torch.Tensor]:
    """Return the running means and variances of BatchNorm; ranks average them as they average gradients."""
    kept = ("running_mean", "running_var")
    return [value for name, value in model.named_buffers() if name.endswith(kept)]


def _scores(validation: Validation) -> dict[str, Any]:
    """Return the fields of an EpochRow that a validation fills."""
    m = validation.metrics
    return {"metrics": (m.precision, m.recall, m.map50, m.map5095), "val_losses": validation.losses}


def _freeze(model: Detector, layers: tuple[int, ...]) -> None:
    """Freeze the layers that `--freeze` names."""
    for index in frozen_layers(model, layers):
        model.model[index].requires_grad_(False)
