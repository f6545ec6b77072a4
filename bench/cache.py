#!/usr/bin/env python3
"""The image cache: the gain of decoding once, the speed of building, and the memory of four replicas on one file.

    python bench/cache.py --data ~/bccd/bccd.yaml --img 640

prints training images/s of the loader (mosaics included) with the shared file and with decoding each time, and their
ratio; images/s of building the file on one core and on all; and the memory of four processes that map the file,
relative to the file's size. Speeds are the best of several rounds that take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
sys.path.insert(0, str(REPOSITORY / "app"))

from starling.config.hyp import Hyp  # noqa: E402
from starling.config.shipped import find_config  # noqa: E402
from starling.core.cgroups import container_cpu_count  # noqa: E402
from starling.data.cache.pixel_folder import kept_files, remove_idle  # noqa: E402
from starling.data.cache.store import ImageStore  # noqa: E402
from starling.data.dataset.dataset import Dataset, DatasetDescription  # noqa: E402
from starling.data.loader.loader import TrainLoader  # noqa: E402

REPLICAS = 4

REPLICA = """
import sys
from pathlib import Path
from starling.data.dataset.dataset import Dataset, DatasetDescription
from starling.data.cache.store import ImageStore

yaml, size, folder = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
store = ImageStore(Dataset.load(DatasetDescription.from_yaml(yaml), "train"), size, "disk", cache_folder=folder)
for index in range(len(store)):
    store[index].sum()
print("mapped", flush=True)
input()
inside, resident, proportional = False, 0, 0
for line in open("/proc/self/smaps"):
    word, *rest = line.split()
    if "-" in word and not word.endswith(":"):
        inside = bool(rest) and rest[-1].endswith(".pixels")
    elif inside and word in ("Rss:", "Pss:"):
        resident += int(rest[0]) * 1024 * (word == "Rss:")
        proportional += int(rest[0]) * 1024 * (word == "Pss:")
print(resident, proportional, flush=True)
input()
"""


def best(body: Callable[[], int], rounds: int) -> float:
    """Return the highest number of units per second of several rounds."""
    speeds = []
    for _ in range(rounds):
        began = time.perf_counter()
        done = body()
        speeds.append(done / (time.perf_counter() - began))
    return max(speeds)


def loading(dataset: Dataset, size: int, folder: Path, rounds: int) -> tuple[float, float]:
    """Return the loader's images/s with decoding each time and with the shared file; the two take turns."""
    speeds = {"off": 0.0, "disk": 0.0}
    loaders = {
        mode: TrainLoader(
            dataset,
            ImageStore(dataset, size, mode, cache_folder=folder),  # type: ignore[arg-type]
            hyp=Hyp(),
            image_size=size,
            batch_size=16,
            seed=0,
            workers=container_cpu_count(),
        )
        for mode in speeds
    }

    def one_epoch(loader: TrainLoader) -> int:
        return sum(len(batch.indices) for batch in loader.epoch(0))

    for _ in range(rounds):
        for mode, loader in loaders.items():
            speeds[mode] = max(speeds[mode], best(lambda loader=loader: one_epoch(loader), 1))  # type: ignore[misc]
    return speeds["off"], speeds["disk"]


def building(dataset: Dataset, size: int, folder: Path, rounds: int) -> tuple[float, float]:
    """Return images/s of building the file on one core and on all cores, including the sync to disk."""

    def build() -> int:
        remove_idle(folder)
        store = ImageStore(dataset, size, "disk", cache_folder=folder)
        assert store.mode == "disk", store.reason
        return len(store)

    cores = os.sched_getaffinity(0)
    speeds = [0.0, 0.0]
    for _ in range(rounds):
        for position, chosen in enumerate(({min(cores)}, cores)):
            os.sched_setaffinity(0, chosen)  # the builder takes as many threads as it may use cores
            try:
                speeds[position] = max(speeds[position], best(build, 1))
            finally:
                os.sched_setaffinity(0, cores)
    return speeds[0], speeds[1]


def sharing(yaml: Path, size: int, folder: Path) -> tuple[int, int]:
    """Return the replicas' memory in bytes: the sum of each replica's view, and the memory that they take together."""
    command = [sys.executable, "-c", REPLICA, str(yaml), str(size), str(folder)]
    replicas = [
        subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(REPLICAS)
    ]
    figures = []
    for expected in ("mapped", ""):
        for replica in replicas:
            assert replica.stdin is not None
            assert replica.stdout is not None
            line = replica.stdout.readline().strip()
            if expected:
                assert line == expected, line
            else:
                figures.append([int(word) for word in line.split()])
        if expected:
            for replica in replicas:
                assert replica.stdin is not None
                replica.stdin.write("\n")
                replica.stdin.flush()
    for replica in replicas:
        replica.communicate("\n")
    return sum(resident for resident, _ in figures), sum(proportional for _, proportional in figures)


def main() -> int:
    """Measure, print, and return 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", default="bccd.yaml", help="dataset YAML, shipped name or path [%(default)s]"
    )
    parser.add_argument("--img", type=int, default=640, help="image size [%(default)s]")
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds, of which the best counts [%(default)s]"
    )
    parser.add_argument("--folder", type=Path, help="folder for the file [a temporary folder]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    yaml = find_config("datasets", args.data)
    dataset = Dataset.load(DatasetDescription.from_yaml(yaml), "train")
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        one, every = building(dataset, args.img, folder, args.rounds)
        resident, together = sharing(yaml, args.img, folder)
        (file,) = kept_files(folder)
        decoding, cached = loading(dataset, args.img, folder, args.rounds)
    report = {
        "images": len(dataset),
        "image_size": args.img,
        "cores": container_cpu_count(),
        "load_decoding_images_per_s": round(decoding, 1),
        "load_cached_images_per_s": round(cached, 1),
        "load_ratio": round(cached / decoding, 2),
        "build_one_core_images_per_s": round(one, 1),
        "build_all_cores_images_per_s": round(every, 1),
        "build_ratio": round(every / one, 2),
        "file_bytes": file.nbytes,
        "replicas": REPLICAS,
        "replicas_see_bytes": resident,
        "replicas_take_bytes": together,
        "replicas_take_of_file": round(together / file.nbytes, 3),
    }
    if args.json:
        print(json.dumps(report))
        return 0
    print(f"{len(dataset)} images at {args.img} px, {report['cores']} cores")
    print(
        f"loader, images/s: {decoding:.0f} decoding each time, {cached:.0f} cached, {cached / decoding:.1f} ×"
    )
    print(f"building, images/s: {one:.0f} on one core, {every:.0f} on all, {every / one:.1f} ×")
    print(
        f"memory of {REPLICAS} replicas: {together / 2**20:.1f} MiB together for a file of {file.nbytes / 2**20:.1f} MiB "
        f"({together / file.nbytes:.3f}); private copies would be {resident / 2**20:.1f} MiB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
