"""The training loop: `restore, then for each epoch fit, score, save`."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from app.config.hyp import Hyp
from app.config.train_config import TrainConfig
from app.config.yaml_reader import write_yaml
from app.data.batching import Batching
from app.data.loader import Batch, TrainLoader
from app.engine import pictures
from app.engine.back_off import split
from app.engine.best_weights import holds_best
from app.engine.checkpoint import load_checkpoint, require, save_checkpoint
from app.engine.data import TrainingData, validation_loader
from app.engine.device import Compute
from app.engine.mistakes import WorstImages, draw_worst
from app.engine.optimizer import BIASES, DECAYED, NORMS, ExponentialMovingAverage, Schedule, build_optimizer
from app.engine.reporter import Reporter
from app.engine.results import EpochRow, write_results
from app.engine.soundness import LossWatch, is_finite
from app.engine.stop_signal import StopSignal
from app.engine.validator import Validation, class_table, to_input, validate
from app.errors import CheckpointError, StarlingError, is_out_of_memory
from app.loss import DetectionLoss, LossGains
from app.model.detector import Detector
from app.model.weights import load_weights
from app.outputs.run_dir import RunDir

GRADIENT_NORM = 10.0
ROLLBACK_RATE = 0.1
"""What a rollback multiplies the learning rate by."""
NOT_VALIDATED = (math.nan,) * 4
RESUMED = (
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
        rollbacks: int = 1,
        back_off: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare a fresh training.

        `rollbacks` is how often a loss that is no number is answered by going back; `back_off` lets a batch that
        does not fit into memory go through in parts.
        """
        self.config, self.hyp, self.data, self.run, self.compute = config, hyp, data, run, compute
        self._reporter, self._stop, self._on_epoch = reporter, stop, on_epoch
        self._image_size = image_size
        self.model = detector.to(compute.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        _freeze(self.model, config.freeze)
        self.average = ExponentialMovingAverage(self.model)
        self.optimizer = build_optimizer(self.model, config.optimizer, hyp, config.batch_size)
        gains = LossGains.scaled(hyp, nc=detector.nc, levels=len(detector.stride), image_size=image_size)
        self.loss = DetectionLoss(detector.stride, detector.head.anchors, detector.nc, gains).to(
            compute.device
        )
        threads = compute.loader_threads(config.workers)
        self.loader = TrainLoader(
            data.train,
            data.train_images,
            hyp=hyp,
            image_size=image_size,
            batch_size=config.batch_size,
            seed=config.seed,
            workers=threads,
            pin_memory=not compute.on_cpu,
            batching=Batching.from_config(config, detector.image_multiple),
        )
        self.val_loader = validation_loader(data, self.model, image_size, config.batch_size, threads)
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
        self._back_off = back_off
        self._parts = 1
        """Parts that a batch goes through in; above 1 after memory ran out."""
        self._clock = clock
        self._saved_at = clock()
        self._saved_position: tuple[int, int] | None = None
        """Epoch and iteration of the checkpoint that this process saved last."""
        self._kept: EpochRow | None = None
        """The row whose weights are in best.pt."""

    def fit(self) -> TrainResult:
        """Train to the last epoch, or until patience runs out.

        Raises Stopped after saving when a signal asks for it, Diverged for a loss that is no number, and
        whatever `on_epoch` raises.
        """
        self._begin()
        while self.epoch < self.config.epochs:
            self._reporter.epoch_began()
            self._fit_epoch()
            if self._has_diverged():
                self._roll_back()
                continue
            self._score_epoch()
            if self._stop.requested and self.epoch < self.config.epochs:
                self._stop_here()
            if self._out_of_patience():
                self._reporter.say(
                    f"stopped early: no better fitness for {self.config.patience} epochs (--patience {self.config.patience})"
                )
                break
        return self._finish()

    def _begin(self) -> None:
        write_yaml(self.run.path / "hyp.yaml", self.hyp.as_dict())
        write_yaml(self.run.path / "opt.yaml", self.config.as_dict())
        if not self.config.noplots and self.epoch == 0:
            pictures.draw_labels(self.data.train, self.run.path)
        if self._rollbacks_left and self.epoch == self.iteration == 0:
            self._beginning = copy.deepcopy(self.state())

    def _fit_epoch(self) -> None:
        self.model.train()
        images = 0
        epoch_start = self.epoch * len(self.loader)
        for batch in self.loader.epoch(self.epoch, start=self.iteration):
            if self.epoch == 0 and self.iteration < pictures.PREVIEWS and not self.config.noplots:
                path = self.run.path / f"train_batch{self.iteration}.jpg"
                pictures.draw_train_batch(batch, self.data.train, path)
            self._iterate(batch, epoch_start + self.iteration)
            self.iteration += 1
            images += len(batch.indices)
            self._reporter.iteration(
                self.epoch, self.config.epochs, self.iteration, len(self.loader), images, self._mean_losses
            )
            if self._last_step == epoch_start + self.iteration - 1:
                self._after_step()
        self._images_in_epoch = images

    def _after_step(self) -> None:
        due = not self.config.nosave and self._clock() - self._saved_at >= 60 * self.config.save_minutes
        if (due or self._stop.requested) and self._has_diverged():
            return  # never saved; the end of the epoch goes back
        if due:
            self._save_last()
        if self._stop.requested:
            self._stop_here()

    def _after_validated(self, images: int) -> None:
        if self._stop.requested:  # the resume begins with this validation
            self._stop_here()

    def _has_diverged(self) -> bool:
        """Return whether a loss of this epoch, or a weight by now, is no number."""
        return self._watch.first_bad() is not None or not is_finite(self.model)

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
        self.restore(self._last_good_state())
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

    def _stop_here(self) -> None:
        """Save, whatever `--nosave` says, and raise Stopped."""
        if self._saved_position != (self.epoch, self.iteration):  # the grace is short, one save is enough
            self._save_last()
        self._stop.raise_if_requested()

    def _iterate(self, batch: Batch, position: int) -> None:
        """Run one batch forward and backward, and a step where enough of them are accumulated."""
        self.schedule.apply(self.optimizer, self.epoch, position, self._rate_scale)
        losses = self._learn(batch, position)
        while losses is None:
            losses = self._learn(batch, position)
        self._loss_sum += losses
        if position - self._last_step >= self.schedule.accumulate(position):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.average.update()
            self._last_step = position

    def _learn(self, batch: Batch, position: int) -> torch.Tensor | None:
        """Run one batch forward and backward and return its [3] losses; None where it must be tried in smaller parts."""
        losses = torch.zeros(3, device=self.compute.device)
        try:
            for part in split(batch, self._parts) if self._parts > 1 else (batch,):
                with self.compute.autocast():
                    predictions = self.model(to_input(part.images, self.compute, part.scaled_hw))
                targets = part.targets.to(self.compute.device, non_blocking=True)
                total, part_losses = self.loss(predictions, targets)
                (total * part.loss_scale).backward()
                self._watch.look(total, position)
                losses += part_losses * (len(part.indices) / len(batch.indices))
        except (RuntimeError, MemoryError) as error:
            if not self._back_off or not is_out_of_memory(error) or self._parts >= len(batch.indices):
                raise
        else:
            return losses
        # Outside the handler, whose traceback would keep the tensors that are to go.
        self._parts *= 2
        self.optimizer.zero_grad(set_to_none=True)
        if not self.compute.on_cpu:
            torch.cuda.empty_cache()
        self._reporter.say(
            f"out of memory: from here each batch of {self.config.batch_size} goes through in {self._parts} parts; "
            "a smaller --batch or --imgsz is faster"
        )
        return None

    def _mean_losses(self) -> tuple[float, float, float]:
        box, obj, cls = (self._loss_sum / max(self.iteration, 1)).tolist()
        return box, obj, cls

    def _score_epoch(self) -> None:
        """Validate where asked, record the row, save, and tell."""
        losses = self._mean_losses()
        last = self.epoch + 1 == self.config.epochs
        validation = None
        if last or not self.config.noval:
            validation = validate(
                self.average.model,
                self.val_loader,
                self.loss,
                self.compute,
                after_batch=self._after_validated,
            )
            self.loader.class_maps = validation.metrics.map_by_class(self.model.nc).tolist()
        row = self._row(losses, validation)
        best = row.validated and (self._kept is None or row.fitness > self._kept.fitness)
        self.rows.append(row)
        self.epoch, self.iteration = self.epoch + 1, 0
        self._loss_sum.zero_()
        write_results(self.run.results_csv, self.rows)
        self._save_epoch(best=best, last=last)
        self._reporter.epoch_ended(row, self.config.epochs, self._images_in_epoch, best)
        self._on_epoch(row)

    def _row(self, losses: tuple[float, float, float], validation: Validation | None) -> EpochRow:
        metrics, val_losses = NOT_VALIDATED, NOT_VALIDATED[:3]
        if validation is not None:
            m = validation.metrics
            metrics, val_losses = (m.precision, m.recall, m.map50, m.map5095), validation.losses
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return EpochRow(
            self.epoch, losses, metrics, val_losses, (rates[BIASES], rates[DECAYED], rates[NORMS])
        )

    def _best_rows(self) -> list[EpochRow]:
        return [row for row in self.rows if row.validated]

    @property
    def best(self) -> EpochRow:
        """The validated row with the highest fitness, the first of equals."""
        return max(self._best_rows(), key=lambda row: row.fitness)

    def _out_of_patience(self) -> bool:
        if not self.config.patience or not self._best_rows():
            return False
        return self.epoch - 1 - self.best.epoch >= self.config.patience

    # --- saving -----------------------------------------------------------------------------------------

    def _save_epoch(self, *, best: bool, last: bool) -> None:
        # In this order a kill between the two leaves a checkpoint that the best can be made from again.
        if last or not self.config.nosave:
            self._save_last()
        if best:
            self._save_best(self.rows[-1])
        period = self.config.save_period
        if period > 0 and self.epoch % period == 0:
            save_checkpoint(self.run.weights / f"epoch{self.epoch - 1}.pt", self.weights())

    def _save_last(self) -> None:
        # After a resume the one before `last.pt` may be the only whole one: the first save leaves it.
        previous = None if self._saved_position is None else self.run.previous
        save_checkpoint(self.run.last, self.state(), previous=previous)
        self._saved_position, self._saved_at = (self.epoch, self.iteration), self._clock()

    def _save_best(self, row: EpochRow) -> None:
        save_checkpoint(self.run.best, self.weights())
        self._kept = row

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
            "parts": self._parts,
            "rollbacks_left": self._rollbacks_left,
            "class_maps": self.loader.class_maps,
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
        require(self.run.last, state, RESUMED)
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
        self._parts = state["parts"]
        self._watch.reset()
        self.loader.class_maps = state.get("class_maps")
        self.rows = [EpochRow.from_list(values) for values in state["rows"]]
        self._restore_best()

    def _restore_best(self) -> None:
        """Find out which row's weights best.pt holds, and mend what a kill between two saves left."""
        if not self._best_rows() or holds_best(self.run.best, self.rows):
            self._kept = self.best if self._best_rows() else None
        elif (self.best.epoch, 0) == (self.epoch - 1, self.iteration):
            self._reporter.say(f"{self.run.best}: written anew from the checkpoint, whose epoch is the best")
            self._save_best(self.best)
        else:
            self._reporter.say(
                f"{self.run.best}: the weights of the best epoch ({self.best.epoch + 1}) are not there; "
                "the file will hold the best of the epochs to come"
            )

    # --- the end ----------------------------------------------------------------------------------------

    def _finish(self) -> TrainResult:
        if self._kept is None:  # a candidate that went on in a folder of its own
            save_checkpoint(self.run.best, self.weights())
        if not self.config.noplots:
            pictures.draw_results(self.run.results_csv, self.run.path / "results.png")
            worst = WorstImages()
            validation = validate(
                self._best_model(),
                self.val_loader,
                None,
                self.compute,
                previews=pictures.PREVIEWS,
                on_image=worst.add,
            )
            self._say_classes(validation)
            pictures.draw_validation(validation, self.data.val, self.run.path)
            draw_worst(worst, self.data.val, self.data.val_images, self.run.path / "worst.jpg")
        return TrainResult(self.rows, self.best, len(self.data.train.images) * len(self.rows))

    def _best_model(self) -> Detector:
        """Return the averaged weights of the best epoch."""
        from app.engine.start import read_weights

        model = self.average.model
        if self.run.best.is_file() and self.best.epoch != self.epoch - 1:
            model.load_state_dict(read_weights(self.run.best).state)
        return model

    def _say_classes(self, validation: Validation) -> None:
        """Print the best epoch's figures for all classes and for each."""
        self._reporter.say(f"best epoch: {self.best.epoch + 1}")
        for line in class_table(validation.metrics, self.data.names):
            self._reporter.say(line)


def _freeze(model: Detector, layers: tuple[int, ...]) -> None:
    """Freeze the first N layers (one number) or the given ones (several)."""
    frozen = range(layers[0]) if len(layers) == 1 else layers
    for index in frozen:
        if index < len(model.model):
            model.model[index].requires_grad_(False)
