#!/usr/bin/env python3
"""The training loop on the CPU: its images/s as a ratio to the model's own step, in one run.

    python bench/train_loop.py --data ~/bccd/bccd.yaml          # default: the mini set in this repository

Prints the rate of the model alone (float32 and contiguous as the reference, then as in the trainer), the rate of the
whole loop with mosaics and all default augmentation, and the loader's share of the processor time. Rounds take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import REPOSITORY, Loop, Step, machine

from starling.core.settings.train import TrainConfig
from starling.device import Compute
from starling.training.setup.data import training_loader


def loader_seconds(loop: Loop) -> float:
    """Return the processor seconds for preparing one image, after images have been decoded."""
    setup = loop.setup
    detector = setup.start.build(setup.data.names, None)
    loader = training_loader(setup.data, detector, loop.config, loop.hyp, setup.image_size, setup.compute)
    loader.workers = 0
    for _ in loader.epoch(0):
        pass
    started = time.thread_time()
    for _ in loader.epoch(1):
        pass
    return (time.thread_time() - started) / len(setup.data.train)


def main() -> int:
    """Measure in turns, and print the table or one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=str(REPOSITORY / "datasets" / "bccd-mini" / "bccd.yaml"))
    parser.add_argument("--cfg", default="yolov5n.yaml")
    parser.add_argument("--img", type=int, default=320)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--epochs", type=int, default=4, help="of a round's training; all but first and last count"
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="of a round's steps of the model alone")
    parser.add_argument("--compile", action="store_true", help="train under --compile")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    rates: dict[str, list[float]] = {"float32, contiguous": [], "as trained": [], "whole loop": []}
    cpu = 0.0
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            data=args.data, weights="", cfg=args.cfg, imgsz=args.img, batch_size=args.batch, epochs=args.epochs,
            device="cpu", noval=True, nosave=True, noplots=True, noautoanchor=True,
        )  # fmt: skip
        loop = Loop(config, Path(folder))
        trained = loop.setup.compute
        plain = Compute(trained.device, False, trained.cores)
        for _ in range(args.rounds):
            reference = Step(args.cfg, args.img, args.batch, plain, channels_last=False)
            rates["float32, contiguous"].append(reference.rate(args.seconds))
            rates["as trained"].append(Step(args.cfg, args.img, args.batch, trained).rate(args.seconds))
            rates["whole loop"].extend(loop.rates(compiled=args.compile))
        cpu = loader_seconds(loop)
    median = {name: statistics.median(values) for name, values in rates.items()}
    ratio = median["whole loop"] / median["float32, contiguous"]
    share = cpu * median["whole loop"] / trained.cores
    if args.json:
        print(
            json.dumps({"machine": machine(), "images_per_s": median, "ratio": ratio, "loader_share": share})
        )
        return 0
    print(f"{args.cfg} at {args.img} px, batch {args.batch}; {trained.describe()}; {machine()}\n")
    for name, value in median.items():
        spread = f"{min(rates[name]):.0f} to {max(rates[name]):.0f}"
        print(f"{name:>20} {value:7.1f} images/s ({spread})")
    print(f"\nwhole loop / float32 contiguous step: {ratio:.2f}")
    print(f"loader: {cpu * 1e3:.2f} ms of one core an image, {share:.1%} of the loop's processor time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
