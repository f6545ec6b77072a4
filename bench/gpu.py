#!/usr/bin/env python3
"""Training on a GPU: check that its numbers are right, then print a table of rates, within eight minutes.

    python bench/gpu.py                                  # yolov5s and yolov5n at 640 px, batch 16, 64 and 128
    python bench/gpu.py --device cpu --img 64 --images 32 --batches 4 --layouts yolov5n.yaml      # a dry run

Images are synthetic, written as JPEG files and read like a user's. "model" is forward, loss, backward, optimizer and
moving average on one batch on the device; "loop" is the product's training with mosaics and all default
augmentation; "augmentation" is the product's loader alone. Exits 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from common import Loop, Step, machine, made_up_targets

from starling.boxes.nms import non_max_suppression
from starling.config.hyp import Hyp
from starling.core.settings.train import TrainConfig
from starling.data.augment.device_paint import DevicePainter
from starling.data.augment.paint import paint_item
from starling.data.augment.plan import plan_item
from starling.model.detector import build_detector
from starling.training.setup.data import training_loader

BUDGET_S = 8 * 60


class Check(NamedTuple):
    """One condition that must hold, and the measured value."""

    name: str
    holds: bool
    seen: str


def make_images(folder: Path, count: int, side: int) -> Path:
    """Write images with three to eight boxes each on a textured background, and return the dataset's YAML."""
    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("val", max(count // 16, 4))):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
        for index in range(number):
            small = rng.integers(0, 255, (side // 16, side // 16, 3), np.uint8)
            image = cv2.resize(small, (side, side * 3 // 4))
            rows = []
            for _ in range(rng.integers(3, 9)):
                kind, (x, y), (w, h) = rng.integers(3), rng.uniform(0.2, 0.8, 2), rng.uniform(0.05, 0.3, 2)
                corner = (int((x - w / 2) * side), int((y - h / 2) * side * 0.75))
                opposite = (int((x + w / 2) * side), int((y + h / 2) * side * 0.75))
                colour = [0, 0, 0]
                colour[kind] = 255
                cv2.rectangle(image, corner, opposite, colour, -1)
                rows.append(f"{kind} {x:.4f} {y:.4f} {w:.4f} {h:.4f}")
            cv2.imwrite(str(folder / "images" / split / f"{index:05}.jpg"), image)
            (folder / "labels" / split / f"{index:05}.txt").write_text("\n".join(rows))
    path = folder / "data.yaml"
    path.write_text("train: images/train\nval: images/val\nnames: [red, green, blue]\n")
    return path


def checks(loop: Loop) -> Iterator[Check]:
    """Compare results of the device with the CPU, and check that an iteration never waits for the device."""
    compute, data = loop.setup.compute, loop.setup.data
    yield _painting(loop)
    generator = torch.Generator().manual_seed(0)
    model = build_detector(loop.config.cfg, 3)
    loss = model.head.build_loss(Hyp(), loop.setup.image_size)
    raw = [torch.randn(4, 3, side, side, 8, generator=generator) for side in (16, 8, 4)]
    targets = made_up_targets(4)
    expected = loss(raw, targets)[1]
    seen = loss.to(compute.device)([r.to(compute.device) for r in raw], targets.to(compute.device))[1].cpu()
    worst = float(((seen - expected) / expected).abs().max())
    yield Check("loss as on the CPU", worst < 1e-4, f"{worst:.1e} relative")
    decoded = torch.rand(4, 2000, 8, generator=generator) * torch.tensor([600, 600, 90, 90, 1, 1, 1, 1.0])
    ours, theirs = (
        non_max_suppression(decoded.to(where), 0.3, 0.6) for where in (compute.device, torch.device("cpu"))
    )
    same = all(
        a.shape == b.shape and torch.allclose(a.cpu(), b, atol=1e-3)
        for a, b in zip(ours, theirs, strict=True)
    )
    yield Check("suppression as on the CPU", same, f"{sum(map(len, theirs))} boxes kept")
    if compute.on_cpu:
        return
    painter = data.train_painter
    yield Check(
        "images on the GPU",
        painter is not None,
        "none" if painter is None else f"{painter.kernel}: {painter.reason}",
    )
    yield _never_waits(loop)


def _painting(loop: Loop) -> Check:
    data, side = loop.setup.data, loop.setup.image_size
    hyp = Hyp(degrees=5.0, shear=2.0, mixup=0.3)
    shapes = data.train_images.shapes_hw
    plans = [
        plan_item(data.train, shapes, hyp, (side, side), seed=0, epoch=0, index=index) for index in range(8)
    ]
    expected = np.empty((len(plans), side, side, 3), np.uint8)
    for plan, image in zip(plans, expected, strict=True):
        paint_item(plan, data.train_images, image)
    painter = DevicePainter.from_store(data.train_images, loop.setup.compute.device)
    painted = painter.paint(plans).permute(0, 2, 3, 1).cpu().numpy()
    mean = float(np.abs(painted.astype(int) - expected).mean())
    return Check(f"images as OpenCV paints them, by {painter.kernel}", mean < 1, f"{mean:.4f} levels of 255")


def _never_waits(loop: Loop) -> Check:
    """Run iterations, including batches painted on the device, while every wait for the device raises an error."""
    config, setup = loop.config, loop.setup
    run = Step(config.cfg, setup.image_size, config.batch_size, setup.compute).prepare()
    detector = setup.start.build(setup.data.names, None)
    loader = training_loader(setup.data, detector, config, loop.hyp, setup.image_size, setup.compute)
    batches = loader.epoch(0)
    name = "an iteration never waits for the GPU"
    for _ in range(3):
        batch = next(batches)
        run(batch.images, batch.targets.to(setup.compute.device, non_blocking=True))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            batch = next(batches)
            run(batch.images, batch.targets.to(setup.compute.device, non_blocking=True))
    except RuntimeError as error:
        return Check(name, False, str(error).splitlines()[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Check(name, True, "3 iterations")


def augmentation_rate(loop: Loop) -> float:
    """Return images per second of the loader alone, over its second epoch."""
    setup = loop.setup
    detector = setup.start.build(setup.data.names, None)
    loader = training_loader(setup.data, detector, loop.config, loop.hyp, setup.image_size, setup.compute)
    seconds = 0.0
    for epoch in range(2):
        started = time.perf_counter()
        for batch in loader.epoch(epoch):
            last = batch.images
        last.reshape(-1)[:1].cpu()  # waits for the device
        seconds = time.perf_counter() - started
    return len(setup.data.train) / seconds


def main() -> int:
    """Check, measure while there is time, and print the table, or one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="0")
    parser.add_argument("--img", type=int, default=640)
    parser.add_argument("--layouts", nargs="+", default=["yolov5s.yaml", "yolov5n.yaml"])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 16, 128])
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument(
        "--epochs", type=int, default=5, help="of a training; the first and the last do not count"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="of the model alone")
    parser.add_argument(
        "--compile", action="store_true", help="measure each loop under --compile too (minutes)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    args = parser.parse_args()
    began = time.monotonic()
    seen: list[Check] = []
    rows: list[dict[str, Any]] = []
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = make_images(folder / "data", args.images, args.img)
        for layout in args.layouts:
            for batch in args.batches:
                if time.monotonic() - began > BUDGET_S * 0.8:
                    print(f"{layout} batch {batch}: left out, the eight minutes are nearly over", flush=True)
                    continue
                config = TrainConfig(
                    data=str(data), weights="", cfg=layout, imgsz=args.img, batch_size=batch, epochs=args.epochs,
                    device=args.device, noval=True, nosave=True, noplots=True, noautoanchor=True, workers=16,
                )  # fmt: skip
                loop = Loop(config, folder)
                if not seen:
                    seen = list(checks(loop))
                    for check in seen:
                        print(f"{'ok  ' if check.holds else 'FAIL'} {check.name}: {check.seen}", flush=True)
                row = measure(loop, args)
                rows.append(row)
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if args.json:
        print(json.dumps({"machine": machine(), "checks": [check._asdict() for check in seen], "rows": rows}))
    return 0 if all(check.holds for check in seen) else 1


def measure(loop: Loop, args: argparse.Namespace) -> dict[str, Any]:
    """Return one row of the table, with rates in images per second."""
    config, compute = loop.config, loop.setup.compute
    model = Step(config.cfg, args.img, config.batch_size, compute).rate(args.seconds)
    whole = statistics.median(loop.rates())
    row: dict[str, Any] = {
        "layout": config.cfg,
        "batch": config.batch_size,
        "model": round(model),
        "loop": round(whole),
        "loop/model": round(whole / model, 2),
        "augmentation": round(augmentation_rate(loop)),
    }
    if args.compile:
        row["loop, compiled"] = round(statistics.median(loop.rates(compiled=True)))
    if not compute.on_cpu:
        row["GiB"] = round(torch.cuda.max_memory_reserved() / 2**30, 1)
    return row


if __name__ == "__main__":
    sys.exit(main())
