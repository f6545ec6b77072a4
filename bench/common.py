"""Common parts of the benchmarks of training: the machine in a line, the rates of the model and of the whole loop."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "app"))

from starling.core.settings.train import TrainConfig
from starling.device import Compute
from starling.model.detector import build_detector
from starling.model.initial_weights import find_initial_weights
from starling.outputs.run_dir import RunDir
from starling.progress import Silence
from starling.stop_signal import StopSignal
from starling.training.optimizer import ExponentialMovingAverage, build_optimizer
from starling.training.reporting.reporter import Reporter, RunLabel
from starling.training.reporting.results import EpochRow
from starling.training.training import TrainingSetup, open_setup, read_hyp, train_in

REPOSITORY = Path(__file__).resolve().parent.parent


def machine() -> str:
    """Return processor, GPU and version of torch in a line."""
    name = platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{len(os.sched_getaffinity(0))} cores of {name}; {gpu}; torch {torch.__version__}"


@dataclass(frozen=True)
class Step:
    """One iteration of a model alone on synthetic input: forward, loss, backward, optimizer, moving average."""

    layout: str
    image_size: int
    batch: int
    compute: Compute
    channels_last: bool = True

    def rate(self, seconds: float, warm_up: int = 3) -> float:
        """Return images per second, over at least `seconds` after `warm_up` iterations."""
        run = self.prepare()
        side, device = self.image_size, self.compute.device
        images = torch.rand(self.batch, 3, side, side).to(device, memory_format=self._memory_format)
        targets = made_up_targets(self.batch).to(device)
        for _ in range(warm_up):
            run(images, targets)
        self._wait()
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            for _ in range(4):
                run(images, targets)
            done += 4
            self._wait()
        return self.batch * done / (time.perf_counter() - started)

    def _wait(self) -> None:
        if not self.compute.on_cpu:
            torch.cuda.synchronize(self.compute.device)

    @property
    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def prepare(self) -> Callable[[Tensor, Tensor], None]:
        """Return the function that runs one iteration on images [B,3,H,W] in 0..1 and targets [n,6]."""
        torch.manual_seed(0)
        hyp, device = read_hyp(TrainConfig(weights="", cfg=self.layout)), self.compute.device
        model = build_detector(self.layout, 3).to(device).to(memory_format=self._memory_format).train()  # type: ignore[call-overload]
        average = ExponentialMovingAverage(model)
        optimizer = build_optimizer(model, "SGD", hyp, self.batch)
        loss = model.head.build_loss(hyp, self.image_size).to(device)

        def run(images: Tensor, targets: Tensor) -> None:
            with self.compute.autocast():
                raw = model(images)
            total, _ = loss(raw, targets)
            total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update()

        return run


def made_up_targets(batch: int, each: int = 12) -> Tensor:
    """Return targets [batch·each, 6]: image, class, xywhn."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(batch * each, 6, generator=generator)
    targets[:, 0] = torch.arange(batch).repeat_interleave(each)
    targets[:, 1] = (targets[:, 1] * 3).floor()
    targets[:, 2:4] = targets[:, 2:4] * 0.8 + 0.1
    targets[:, 4:] = targets[:, 4:] * 0.25 + 0.03
    return targets


@contextlib.contextmanager
def runs_below(folder: Path) -> Iterator[None]:
    """Let trainings write everything below `folder`."""
    before = os.environ.get("STARLING_RUNS")
    os.environ["STARLING_RUNS"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("STARLING_RUNS")
        if before is not None:
            os.environ["STARLING_RUNS"] = before


class Loop:
    """The product's training loop with all default augmentation; data are loaded once, each measurement trains."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.hyp = read_hyp(config)
        with runs_below(folder):
            self.setup: TrainingSetup = open_setup(
                config, find_initial_weights(config.weights, config.cfg), self.hyp
            )

    def rates(self, *, compiled: bool = False) -> list[float]:
        """Return images per second of each epoch, without the first one (warm-up) and the last one (validation)."""
        ends: list[float] = []

        def note(row: EpochRow) -> None:
            ends.append(time.perf_counter())

        run = RunDir(self.folder / "run")
        run.weights.mkdir(parents=True, exist_ok=True)
        silent = Reporter(RunLabel("", "", "run"), run.path, progress=Silence())
        with runs_below(self.folder), StopSignal() as stop:
            train_in(self.setup, replace(self.config, compile=compiled), self.hyp, run, silent, stop,
                     on_epoch=note)  # fmt: skip
        images = len(self.setup.data.train)
        return [images / (end - start) for start, end in pairwise(ends[:-1])]
