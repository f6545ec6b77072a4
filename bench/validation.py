#!/usr/bin/env python3
"""Validation compared with its forward passes: the ratio of the whole to the network alone, and the time of each stage.

    python bench/validation.py [--data ~/bccd/bccd.yaml] [--weights best.pt] [--img 320] [--batch 32]

Two detectors: `trained` (by default the small detector of the tests) and `early`, fresh weights with a raised
objectness, so that every box is a candidate. Each runs in two ways: as in training (with loss, separate BatchNorm) and
as in val.py (no loss, fused BatchNorm). Whole passes and forward passes take turns, and the fastest of each
counts. On a busy machine use `--threads 1` and the ratio of processor seconds, which other load hardly affects.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
sys.path.insert(0, str(REPOSITORY / "app"))

from starling.config.hyp import Hyp  # noqa: E402 - found by the line above
from starling.config.shipped import find_config  # noqa: E402
from starling.data.cache.store import ImageStore  # noqa: E402
from starling.data.dataset.dataset import Dataset, DatasetDescription  # noqa: E402
from starling.data.loader.loader import ValLoader  # noqa: E402
from starling.device import Compute, select_compute  # noqa: E402
from starling.evaluation.evaluation import Stopwatch  # noqa: E402
from starling.evaluation.validator import Validation, validate  # noqa: E402
from starling.model.detector import Detector, build_detector  # noqa: E402
from starling.model.initial_weights import read_weights  # noqa: E402
from starling.model.loss import Loss  # noqa: E402
from starling.model.weights import load_weights  # noqa: E402
from starling.prediction.predictor import to_input  # noqa: E402

TRAINED = REPOSITORY / "tests" / "detector" / "cells.pt"
RAISED = 5.0
"""Number that `early` adds to the logits of objectness."""
BAR = 1.25
"""Maximum ratio."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one case."""

    name: str
    ratio: float
    """Seconds of the fastest whole pass divided by those of the fastest forward pass."""
    processor_ratio: float
    """The same ratio of processor seconds."""
    ratios: list[float]
    """Ratio of the two passes of each repeat."""
    whole_ms: float
    """Milliseconds per image of the fastest pass."""
    forward_ms: float
    stages_ms: dict[str, float]
    """Milliseconds per image, in a separate pass that waits for the device after each stage."""
    detections: float
    """Number per image."""
    map50: float
    map5095: float


def early(nc: int, layout: str) -> Detector:
    """Return a detector with fresh weights that detects something everywhere."""
    torch.manual_seed(0)
    detector = build_detector(layout, nc)
    with torch.no_grad():
        for convolution in detector.head.m:
            convolution.bias.view(-1, detector.head.outputs)[:, 4] += RAISED
    return detector.eval()


def trained(path: Path) -> Detector:
    """Return the detector of a checkpoint."""
    weights = read_weights(path)
    assert weights.layout is not None, f"{path} holds no layout"
    detector = build_detector(weights.layout, len(weights.names), names=weights.names)
    load_weights(detector, weights.state, source=str(path))
    return detector.eval()


def loss_of(detector: Detector, size: int, compute: Compute) -> Loss:
    """Return the loss that training would use."""
    return detector.head.build_loss(Hyp(), size).to(compute.device)


@torch.no_grad()
def forward_seconds(detector: Detector, batches: ValLoader, compute: Compute) -> np.ndarray:
    """Return the [wall, processor] seconds of the forward passes over the split alone, inputs ready on the device."""
    wait = torch.cuda.synchronize if not compute.on_cpu else lambda: None
    total = np.zeros(2)
    # Batches are listed first: the loader's thread would otherwise work on the next batch meanwhile.
    for batch in list(batches):
        images = to_input(batch.images, compute)
        wait()
        began = now()
        with compute.autocast():
            detector(images)
        wait()
        total += now() - began
    return total


def now() -> np.ndarray:
    """Return [wall, processor] seconds."""
    return np.array((time.perf_counter(), time.process_time()))


def timed(work: Callable[[], Validation]) -> tuple[np.ndarray, Validation]:
    """Return the [wall, processor] seconds of a call, and its result."""
    began = now()
    validation = work()
    return now() - began, validation


def measure(
    name: str,
    detector: Detector,
    batches: ValLoader,
    loss: Loss | None,
    compute: Compute,
    repeats: int,
) -> Figures:
    """Return the figures of one case; the first pass of each kind is a warm-up and does not count."""
    detector = detector.to(compute.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def whole() -> Validation:
        return validate(detector, batches, loss, compute)

    forward_seconds(detector, batches, compute)
    whole()
    forward, entire = [], []
    for _ in range(repeats):
        forward.append(forward_seconds(detector, batches, compute))
        seconds, validation = timed(whole)
        entire.append(seconds)
    found = 0

    def count(image: object) -> None:
        nonlocal found
        found += len(image.detections)  # type: ignore[attr-defined]

    watch = Stopwatch(compute.device)
    validate(detector, batches, loss, compute, lap=watch, on_image=count)
    watch("scores of the whole")
    images = validation.images
    fastest_whole, fastest_forward = np.min(entire, axis=0), np.min(forward, axis=0)
    ratio, processor_ratio = (fastest_whole / fastest_forward).tolist()
    return Figures(
        name=name,
        ratio=ratio,
        processor_ratio=processor_ratio,
        ratios=[a / b for (a, _), (b, _) in zip(entire, forward, strict=True)],
        whole_ms=fastest_whole[0] / images * 1000,
        forward_ms=fastest_forward[0] / images * 1000,
        stages_ms={stage: seconds / images * 1000 for stage, seconds in watch.seconds.items()},
        detections=found / images,
        map50=validation.metrics.map50,
        map5095=validation.metrics.map5095,
    )


def told(figures: Figures) -> str:
    """Return the lines of one case."""
    stages = "  ".join(f"{stage} {value:.2f}" for stage, value in figures.stages_ms.items())
    return (
        f"{figures.name:<22} ratio {figures.ratio:5.2f}  (median {statistics.median(figures.ratios):.2f}, "
        f"{min(figures.ratios):.2f} to {max(figures.ratios):.2f}); "
        f"processor seconds {figures.processor_ratio:.2f}\n"
        f"    ms an image: whole {figures.whole_ms:.2f}  forward alone {figures.forward_ms:.2f}\n"
        f"    stages, ms an image: {stages}\n"
        f"    {figures.detections:.0f} detections an image, "
        f"mAP50 {figures.map50:.4f}, mAP50-95 {figures.map5095:.4f}"
    )


def machine(compute: Compute) -> str:
    """Return a line about the machine and its load."""
    load = os.getloadavg()[0]
    return f"{compute.describe()}, {compute.cores} cores, load {load:.1f}, torch {torch.__version__}, {platform.machine()}"


def main() -> int:
    """Measure and print each case, and return 0 if all reach the bar."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="bccd.yaml", help="YAML of a dataset [the small one shipped here]")
    parser.add_argument("--split", default="val")
    parser.add_argument("--weights", type=Path, default=TRAINED)
    parser.add_argument("--cfg", default="yolov5n.yaml", help="layout of the early detector")
    parser.add_argument("--img", type=int, default=320)
    parser.add_argument(
        "--batch", type=int, default=32, help="images of a batch; training takes twice its own"
    )
    parser.add_argument("--device", default="")
    parser.add_argument("--amp", choices=("auto", "off"), default="auto")
    parser.add_argument("--threads", type=int, help="of the network on a CPU [all cores]")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="end with all figures as one line of JSON")
    args = parser.parse_args()
    compute = select_compute(args.device, args.amp)
    if args.threads:
        torch.set_num_threads(args.threads)
    data = Dataset.load(DatasetDescription.from_yaml(find_config("datasets", args.data)), args.split)
    store = ImageStore(data, args.img, "ram")
    print(machine(compute))
    print(f"{args.split}: {len(data)} images at {args.img} px in batches of {args.batch}", flush=True)
    cases = []
    for name, detector in (("early", early(data.nc, args.cfg)), ("trained", trained(args.weights))):
        batches = ValLoader(
            data, store, image_size=args.img, batch_size=args.batch, stride=detector.image_multiple,
            workers=compute.loader_threads(8), pin_memory=not compute.on_cpu,
        )  # fmt: skip
        fused, loss = detector.fused(), loss_of(detector, args.img, compute)
        cases.append(measure(f"{name}, in training", detector, batches, loss, compute, args.repeats))
        print(told(cases[-1]), flush=True)
        cases.append(measure(f"{name}, val.py", fused, batches, None, compute, args.repeats))
        print(told(cases[-1]), flush=True)
    if args.json:
        print(json.dumps({"machine": machine(compute), "cases": [asdict(case) for case in cases]}))
    return 0 if all(case.ratio <= BAR for case in cases) else 1


if __name__ == "__main__":
    sys.exit(main())
