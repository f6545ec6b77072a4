#!/usr/bin/env python3
"""Idle time of a search's worker: seconds from the end of one training to the first batch of the next.

    python bench/between_candidates.py [--evolve 6]

Runs a real search on the mini set in this process, with tracking, and prints the gaps beside the trainings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from common import REPOSITORY, machine, runs_below

from starling.core.settings.train import TrainConfig
from starling.search.training import search
from starling.training.trainer import Trainer, TrainResult


def main() -> int:
    """Search, and print the gaps between trainings, or one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=str(REPOSITORY / "datasets" / "bccd-mini" / "bccd.yaml"))
    parser.add_argument("--cfg", default="yolov5n.yaml")
    parser.add_argument("--img", type=int, default=160)
    parser.add_argument("--evolve", type=int, default=6, help="trainings")
    parser.add_argument("--device", default="")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    spans: list[tuple[float, float]] = []
    fit = Trainer.fit

    def timed(self: Trainer) -> TrainResult:
        began = time.perf_counter()
        result = fit(self)
        spans.append((began, time.perf_counter()))
        return result

    Trainer.fit = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder, runs_below(Path(folder)):
        search(
            TrainConfig(
                data=args.data, weights="", cfg=args.cfg, imgsz=args.img, epochs=1, evolve=args.evolve,
                device=args.device, project="bench", name="gaps",
            )
        )  # fmt: skip
    gaps = [after[0] - before[1] for before, after in pairwise(spans)]
    trainings = [end - began for began, end in spans]
    if args.json:
        print(json.dumps({"machine": machine(), "gaps_s": gaps, "trainings_s": trainings}))
        return 0
    print(f"\n{machine()}\n{len(spans)} trainings of {statistics.median(trainings):.1f} s")
    print(f"between two: {statistics.median(gaps):.2f} s, at most {max(gaps):.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
