#!/usr/bin/env python3
"""Augmentation: images per second of each painter, for the same plans, as ratios to OpenCV on one thread.

    python bench/augment.py [--img 320] [--batch 16] [--json]

Images are synthetic and in memory, the plans are mosaics with the default hyps. Each painter's figure is the best of
several rounds. The painters take turns, so that other load on the machine affects all. On a GPU a round waits for its
last image.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "app"))

from starling.config.hyp import Hyp
from starling.data.augment.device_paint import DevicePainter
from starling.data.augment.device_tables import load_tables
from starling.data.augment.paint import paint_item
from starling.data.augment.plan import ItemPlan, plan_item

IMAGES = 64


class Sources(list[np.ndarray[Any, Any]]):
    """Dataset images in memory, with the interface of a store."""

    @property
    def shapes_hw(self) -> np.ndarray[Any, Any]:
        """[N,2] height and width."""
        return np.array([image.shape[:2] for image in self])


def make_sources(side: int) -> tuple[Any, Sources]:
    """Return noise images of three aspects, with ten boxes each."""
    rng = np.random.default_rng(0)
    shapes = [((side, side), (side * 3 // 4, side), (side, side * 2 // 3))[i % 3] for i in range(IMAGES)]
    store = Sources(rng.integers(0, 256, (*hw, 3), np.uint8) for hw in shapes)
    boxes = rng.uniform((0, 0.2, 0.2, 0.05, 0.05), (9, 0.8, 0.8, 0.3, 0.3), (IMAGES, 10, 5))
    labels = list(boxes.astype(np.float32))
    return SimpleNamespace(images=[Path(str(i)) for i in range(IMAGES)], labels=labels, polygons=[]), store


def seconds_of(work: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the best time of each function; all take turns, after one round that is not counted."""
    best = dict.fromkeys(work, float("inf"))
    for turn in range(rounds + 1):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            if turn:
                best[name] = min(best[name], time.perf_counter() - started)
    return best


def painters(plans: list[ItemPlan], store: Sources, repeats: int) -> dict[str, Callable[[], Any]]:
    """Return by name the functions that paint the plans once, or `repeats` times on a GPU."""
    images = np.empty((len(plans), *plans[0].hw, 3), np.uint8)

    def with_opencv() -> None:
        for plan, image in zip(plans, images, strict=True):
            paint_item(plan, store, image)

    on_cpu = DevicePainter.from_store(store, torch.device("cpu"), kernel="torch")
    work: dict[str, Callable[[], Any]] = {"opencv": with_opencv, "torch, cpu": lambda: on_cpu.paint(plans)}
    if torch.cuda.is_available():
        for kernel in ("torch", "triton"):
            painter = DevicePainter.from_store(
                store,
                torch.device("cuda"),
                kernel="torch" if kernel == "torch" else "auto",
                dtype=torch.bfloat16,
            )
            if painter.kernel != kernel:
                print(f"no {kernel}: {painter.reason}", file=sys.stderr)
                continue

            def with_gpu(painter: DevicePainter = painter) -> None:
                for _ in range(repeats):
                    painter.paint(plans)
                torch.cuda.synchronize()

            work[f"{kernel}, cuda"] = with_gpu
    return work


def main() -> int:
    """Time every painter that works here, and print the table or one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--img", type=int, default=320, help="side of an image in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=20, help="batches of a round on a GPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    dataset, store = make_sources(args.img)
    shapes, hyp, hw = store.shapes_hw, Hyp(), (args.img, args.img)
    offsets = np.concatenate(([0], np.cumsum(shapes.prod(1) * 3)))

    def make_plans() -> list[ItemPlan]:
        return [
            plan_item(dataset, shapes, hyp, hw, seed=0, epoch=0, index=i % IMAGES) for i in range(args.batch)
        ]

    plans = make_plans()
    work = painters(plans, store, args.repeats)
    work["planning"] = make_plans
    work["tables"] = lambda: load_tables(plans, offsets, shapes, torch.device("cpu"))
    best = seconds_of(work, args.rounds)
    rates = {
        name: args.batch * (args.repeats if name.endswith("cuda") else 1) / seconds
        for name, seconds in best.items()
    }
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    machine = f"{platform.machine()}, {machine}, torch {torch.__version__}, OpenCV {cv2.__version__}"
    ratios = {name: rate / rates["opencv"] for name, rate in rates.items()}
    if args.json:
        print(json.dumps({"machine": machine, "img": args.img, "batch": args.batch,
                          "images_per_s": rates, "ratio_to_opencv": ratios}))  # fmt: skip
        return 0
    print(f"{args.batch} mosaics of {args.img} px; one CPU thread; {machine}\n")
    print(f"{'':>14} {'images/s':>10} {'to OpenCV':>10}")
    for name, rate in rates.items():
        print(f"{name:>14} {rate:10.0f} {ratios[name]:10.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
