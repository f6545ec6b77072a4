#!/usr/bin/env python3
"""Accuracy of the whole trainer: yolov5n from scratch on BCCD, 320 px, batch 16, 60 epochs, default hyps.

    python bench/accuracy.py --data ~/bccd/bccd.yaml

trains with seeds 0 and 1, and prints the figures of the final weights on the validation split beside those of the
classic trainer on the same set. A seed takes 5 to 15 minutes of two cores. Exits 1 if the mean is below the bar.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BAR = (0.77, 0.44)
"""Minimum mAP50 and mAP50-95, as the mean over seeds 0 and 1."""
CLASSIC = {0: (0.749, 0.423), 1: (0.791, 0.465)}
"""Figures of the classic trainer for the two seeds."""


def train(data: Path, seed: int, epochs: int, folder: Path, extra: list[str]) -> tuple[float, float]:
    """Return (mAP50, mAP50-95) of the final weights of one training."""
    command = [sys.executable, "app/train.py", "--data", str(data), "--weights", "", "--cfg", "yolov5n.yaml",
               "--img", "320", "--batch", "16", "--epochs", str(epochs), "--seed", str(seed),
               "--project", "accuracy", "--name", f"seed{seed}", "--exist-ok", *extra]  # fmt: skip
    subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "STARLING_RUNS": str(folder)}, check=True)
    with open(folder / "accuracy" / f"seed{seed}" / "results.csv") as file:
        final = list(csv.DictReader(file))[-1]
    return float(final["metrics/mAP_0.5"]), float(final["metrics/mAP_0.5:0.95"])


def main() -> int:
    """Train with each seed, print the table, and return 0 if the mean reaches the bar."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="YAML of the whole BCCD set (364 images)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--runs", type=Path, help="keep the runs here [a temporary folder]")
    args, extra = parser.parse_known_args()
    figures: dict[int, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.runs or Path(temporary)).absolute()
        for seed in args.seeds:
            started = time.monotonic()
            figures[seed] = train(args.data.absolute(), seed, args.epochs, folder, extra)
            print(f"seed {seed}: {time.monotonic() - started:.0f} s", flush=True)
    print(f"\n{'':>6} {'mAP50':>7} {'mAP50-95':>9}   classic trainer")
    for seed, (map50, map5095) in figures.items():
        classic = "  ".join(f"{value:.3f}" for value in CLASSIC.get(seed, ()))
        print(f"{'seed ' + str(seed):>6} {map50:7.3f} {map5095:9.3f}   {classic}")
    mean = [sum(values) / len(figures) for values in zip(*figures.values(), strict=True)]
    print(f"{'mean':>6} {mean[0]:7.3f} {mean[1]:9.3f}   bar: {BAR[0]:.2f}  {BAR[1]:.2f}")
    return 0 if mean[0] >= BAR[0] and mean[1] >= BAR[1] else 1


if __name__ == "__main__":
    sys.exit(main())
