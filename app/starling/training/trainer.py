"""The training loop: `restore, then for each epoch fit, score, save`."""

from __future__ import annotations

import copy
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

GRADIENT_NORM = 10.0
ROLLBACK_RATE = 0.1
"""What a rollback multiplies the learning rate by."""
NOT_VALIDATED = (math.nan,) * 4
FIRST_FILES = ("opt.yaml", "hyp.yaml", DIFF, *plots.LABELS)
"""What a run directory holds before the first iteration, for the trackers."""
TRAINER_STATE = (
    *("names", "model", "ema", "ema_updates", "optimizer", "gradients"),
    *("epoch", "iteration", "last_step", "loss_sum", "rows", "rate_scale", "rollbacks_left", "parts"),
)
"""What a resumable checkpoint holds for the trainer."""


class Diverged(StarlingError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a finished training leaves: its rows, and the one with the highest fitness."""

    rows: list[EpochRow]
    best: EpochRow
    images: int
    """Images through forward and backward."""


@dataclass(frozen=True, slots=True)
class Glances:
    """Validations on the way that only a search looks at; they choose no best weights and stand in no row."""

    epochs: Container[int]
    """After how many epochs."""
    tell: Callable[[int, float], None]
    """Takes the epochs done and the fitness; whatever it raises ends the training."""


class Trainer:
    """Train one detector. All that a resume needs is in `state()`; the rest follows from the position."""

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

        `conditions` returns what a checkpoint is to record of where and on what data it was made.

        `rollbacks` is how often a loss that is no number is answered by going back; `back_off` lets a batch that
        does not fit into memory go through in parts, which several processes cannot: they must stay in step.
        """
        self.config, self.hyp, self.data, self.run, self.compute = config, hyp, data, run, compute
        self._reporter, self._stop, self._on_epoch, self._glances = reporter, stop, on_epoch, glances
        self._image_size, self._group = image_size, group
        self._conditions = conditions
        self.notes: list[str] = []
        """What the resumes of this training said of their exactness."""
        if config.sync_bn:
            detector = nn.SyncBatchNorm.convert_sync_batchnorm(detector)
        self.model = detector.to(compute.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        _freeze(self.model, config.freeze)
        forward = group.wrap(self.model, compute)
        if config.compile:
            forward = CompiledForward(forward, compute, reporter.say)
        self._statistics = _running_statistics(self.model)
        self.average = ExponentialMovingAverage(self.model)
        self.optimizer = build_optimizer(self.model, config.optimizer, hyp, config.batch_size)
        self.loss = self.model.head.build_loss(hyp, image_size)
        self._learner = Learner(
            forward, self.loss, self.optimizer, compute, group, reporter.say, back_off=back_off
        )
        self.loader = training_loader(data, detector, config, hyp, image_size, compute, group)
        self.val_loader = validation_loader(data, detector, config, image_size, compute, group)
        self.schedule = Schedule(hyp, config.epochs, len(self.loader), config.batch_size, config.cos_lr)
        self.epoch = 0
        self.iteration = 0
        """Iterations done of this epoch."""
        self.rows: list[EpochRow] = []
        self._images_in_epoch = 0
        self._last_step = -1
        self._loss_sum = torch.zeros(3, device=compute.device)
        self._watch = LossWatch(compute.device)
        self._rollbacks_left = rollbacks
        self._rate_scale = 1.0
        """Learning rates are multiplied by it; below 1 after a rollback."""
        self._beginning: dict[str, Any] | None = None
        self._ahead: Iterator[Batch] | None = None
        """The next epoch's batches, where the loader has begun them."""
        self._saver = Saver(
            config, run, self.state, self.weights, reporter.say, writes=group.is_main, clock=clock
        )

    def fit(self) -> TrainResult:
        """Train to the last epoch, or until patience runs out.

        Raises Stopped after saving when a signal asks for it, Diverged for a loss that is no number, and
        whatever `on_epoch` raises.
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
            self._reporter.say(
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
        if self.rows:  # a kill may have come before the row was written, or this folder is another worker's
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
        """Return what is left of this epoch, begun during the last validation where that could be."""
        batches, self._ahead = self._ahead, None
        if batches is None or self.iteration:
            batches = self.loader.epoch(self.epoch, start=self.iteration)
        return batches

    def _begin_next(self) -> None:
        """Let the loader begin the next epoch's first batches, which are ready when the validation is over."""
        if not self.config.image_weights:  # those are drawn by what the validation says
            self._ahead = self.loader.epoch(self.epoch + 1)

    @property
    def _draws(self) -> bool:
        return self._group.is_main and not self.config.noplots

    def _after_step(self) -> None:
        due, signum = self._group.highest(self._saver.due(), self._stop.signum or 0)
        if not (due or signum) or self._has_diverged():
            return  # what has diverged is never saved; the end of the epoch goes back
        if due:
            self._saver.save_last((self.epoch, self.iteration))
        self._stop_if_asked()  # now too: a save takes its time

    def _after_validated(self, images: int) -> None:
        self._stop_if_asked()  # the resume begins with this validation

    def _stop_if_asked(self) -> None:
        (signum,) = self._group.highest(self._stop.signum or 0)
        if signum:
            self._stop_here(signum)

    def _stop_here(self, signum: int) -> None:
        """Save, whatever `--nosave` says, and raise Stopped, on all ranks."""
        if self._saver.saved != (self.epoch, self.iteration):  # the grace is short, one save is enough
            self._saver.save_last((self.epoch, self.iteration))
        self._group.barrier()  # nobody leaves before it is saved, or torchrun would hurry the one who saves
        raise Stopped(signum)

    def _has_diverged(self) -> bool:
        """Return whether a loss of this epoch, or a weight by now, is no number on any rank."""
        (bad,) = self._group.highest(self._watch.first_bad() is not None or not is_finite(self.model))
        return bool(bad)

    def _roll_back(self) -> None:
        """Go back to the last good state at a tenth of the rate; raise Diverged where that was tried before."""
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
        self._reporter.say(
            f"{where}: the loss is no longer a number; going on from epoch {self.epoch + 1}, iteration "
            f"{self.epoch * len(self.loader) + self.iteration}, with the learning rate times {scale:g}"
        )

    def _last_good_state(self) -> dict[str, Any]:
        """Return what `last.pt` of this very run holds, else how the run began."""
        if self.run.last.is_file():
            state = load_checkpoint(self.run.last)
            if state["run_uuid"] == self._reporter.label.uuid:
                return state
        assert self._beginning is not None, "a run that began here remembers how"
        return self._beginning

    def _iterate(self, batch: Batch, position: int) -> None:
        """Run one batch forward and backward, and a step where enough of them are accumulated."""
        self.schedule.apply(self.optimizer, self.epoch, position, self._rate_scale)
        parts = self._learner.parts
        losses = self._group.sum(self._learner.learn(batch))
        if self._learner.parts != parts:
            self._last_step = (
                position - 1
            )  # what was gathered is gone: the step gathers its nominal batch anew
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
        """Validate where asked, record the row, save, and tell."""
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
        """The validated row with the highest fitness, the newest of equals; the last row where none was validated."""
        return kept_row(self.rows)

    # --- state ------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Any]:
        """Return what inference and fine-tuning need: the averaged weights in half precision."""
        # Anchors stay exact: they are a few numbers, and the layout beside them holds the same ones.
        half = {
            key: value.half() if value.is_floating_point() and not key.endswith("anchors") else value
            for key, value in self.average.model.state_dict().items()
        }
        return {"kind": "weights", "ema": half, **self._description()}

    def state(self) -> dict[str, Any]:
        """Return everything that `restore` needs to go on exactly here."""
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
            "gradients": gradients,  # of iterations since the last step; an epoch may end between two
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
        """Go on from what `state()` returned. Raises CheckpointError if it belongs to other data or settings."""
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
        self._ahead = None  # an early stop has no use for it
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
        """See to it that the last epoch is validated and saved, where it ended sooner than was planned."""
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
        """Return the averaged weights of the best epoch."""
        from starling.model.initial_weights import read_weights

        model = self.average.model
        if self._group.is_main and self.run.best.is_file() and self.best.epoch != self.epoch - 1:
            model.load_state_dict(read_weights(self.run.best).state)
        self._group.copy_from_main(model.state_dict().values())
        return model

    def _say_classes(self, validation: Validation) -> None:
        """Print the best epoch's figures for all classes and for each."""
        self._reporter.say(f"best epoch: {self.best.epoch + 1}")
        for line in class_table(validation.metrics, self.data.val.distinct_names):
            self._reporter.say(line)


def _running_statistics(model: nn.Module) -> list[torch.Tensor]:
    """Return the means and variances that BatchNorm keeps, which ranks average as they do gradients."""
    kept = ("running_mean", "running_var")
    return [value for name, value in model.named_buffers() if name.endswith(kept)]


def _scores(validation: Validation) -> dict[str, Any]:
    """Return what a validation adds to its epoch's row."""
    m = validation.metrics
    return {"metrics": (m.precision, m.recall, m.map50, m.map5095), "val_losses": validation.losses}


def _freeze(model: Detector, layers: tuple[int, ...]) -> None:
    """Freeze the layers that `--freeze` means."""
    for index in frozen_layers(model, layers):
        model.model[index].requires_grad_(False)
