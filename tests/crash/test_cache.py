"""The shared file of decoded images among several real processes: killed, waiting, sharing, out of space."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from starling import settings
from starling.cli import train
from starling.data.cache.pixel_folder import kept_files, remove_idle
from starling.data.cache.store import ImageStore
from starling.data.dataset.dataset import Dataset, DatasetDescription
from tests.conftest import REPOSITORY

IMAGES = 24
SIZE = 256

CHILD = """
import sys, time
from pathlib import Path
from starling.core.log_lines import lines_to
from starling.data.cache import resized
from starling.data.dataset.dataset import Dataset, DatasetDescription
from starling.data.cache.store import ImageStore

folder, stop_at = Path(sys.argv[1]), int(sys.argv[2])
decode, decoded = resized.decode_image, []

def counting(path):
    decoded.append(path)
    return decode(path)

def progress(done, total):
    if done == stop_at:
        print("building", flush=True)
        time.sleep(60)

resized.decode_image = counting
dataset = Dataset.load(DatasetDescription.from_yaml(folder / "data.yaml"), "train")
print("start", flush=True)
input()
with lines_to(lambda line: print(line, flush=True)):
    store = ImageStore(dataset, 256, "disk", cache_folder=folder / "cache", progress=progress)
checksum = sum(int(store[index].sum()) for index in range(len(dataset)))
print("ready", store.mode, len(decoded), checksum, store.reason, flush=True)
input()
smaps = Path("/proc/self/smaps").read_text().splitlines()
inside, rss, pss = False, 0, 0
for line in smaps:
    word, *rest = line.split()
    if "-" in word and not word.endswith(":"):
        inside = bool(rest) and rest[-1].endswith(".pixels")
    elif inside and word == "Rss:":
        rss += int(rest[0]) * 1024
    elif inside and word == "Pss:":
        pss += int(rest[0]) * 1024
print(rss, pss, flush=True)
input()
"""


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    (tmp_path / "images").mkdir()
    for number in range(IMAGES):
        pixels = np.random.default_rng(number).integers(0, 255, (200, 256, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number:02}.bmp")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [x]\n")
    return Dataset.load(DatasetDescription.from_yaml(tmp_path / "data.yaml"), "train")


class Child:
    """A process that builds or maps the cache when told to go on."""

    def __init__(self, folder: Path, stop_at: int, limit_bytes: int | None) -> None:
        def limit() -> None:
            if limit_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder), str(stop_at)],
            cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=limit,
        )  # fmt: skip

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


Start = Callable[..., Child]


@pytest.fixture
def start(dataset: Dataset, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a process, which has the dataset read and waits to go on."""
    children: list[Child] = []

    def start_child(stop_at: int = 0, limit_bytes: int | None = None) -> Child:
        children.append(Child(tmp_path, stop_at, limit_bytes))
        assert children[-1].hear() == "start"
        return children[-1]

    yield start_child
    for child in children:
        if child.process.poll() is None:
            child.kill()
        for pipe in (child.process.stdin, child.process.stdout):
            if pipe is not None:
                pipe.close()


def _checksum(dataset: Dataset) -> int:
    truth = ImageStore(dataset, SIZE, "off")
    return sum(int(truth[index].sum()) for index in range(len(dataset)))


def test_a_builder_that_is_killed_is_taken_over_by_a_waiter_which_had_said_whom_it_waits_for(
    dataset: Dataset, tmp_path: Path, start: Start
) -> None:
    builder, waiter = start(stop_at=IMAGES // 2), start()
    builder.go_on()
    assert builder.hear() == "building"
    waiter.go_on()
    said = waiter.hear()
    assert said.startswith(
        f"waiting for process {builder.process.pid} on {os.uname().nodename}, which builds"
    )
    assert remove_idle(tmp_path / "cache") == []
    assert len(list((tmp_path / "cache").glob(".*.part"))) == 1
    builder.kill()
    assert waiter.hear().startswith(f"ready disk {IMAGES} {_checksum(dataset)} ")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".pixels"]


def test_four_processes_at_once_decode_each_image_once_and_keep_one_copy_in_memory(
    dataset: Dataset, tmp_path: Path, start: Start
) -> None:
    children = [start() for _ in range(4)]
    for child in children:
        child.go_on()
    heard = []
    for child in children:
        while not (line := child.hear()).startswith("ready"):
            assert line.startswith(("waiting for process ", "waiting for another process"))  # not named yet
        heard.append(line.split()[1:4])
    assert {(mode, checksum) for mode, _, checksum in heard} == {("disk", str(_checksum(dataset)))}
    assert sum(int(decoded) for _, decoded, _ in heard) == IMAGES
    (kept,) = kept_files(tmp_path / "cache")
    for child in children:
        child.go_on()
    resident, proportional = zip(*(map(int, child.hear().split()) for child in children), strict=True)
    pixels = IMAGES * 200 * 256 * 3
    assert min(resident) >= pixels  # each has the whole set before it
    assert pixels <= sum(proportional) <= kept.nbytes  # and together they have it once


def test_a_file_is_in_use_until_its_last_process_has_ended(tmp_path: Path, start: Start) -> None:
    child = start()
    child.go_on()
    assert child.hear().startswith("ready disk")
    assert [kept.in_use for kept in kept_files(tmp_path / "cache")] == [True]
    assert remove_idle(tmp_path / "cache") == []
    child.kill()
    assert len(remove_idle(tmp_path / "cache")) == 1


def test_a_disk_that_refuses_in_mid_write_leaves_nothing_and_the_run_goes_on_in_memory(
    dataset: Dataset, tmp_path: Path, start: Start
) -> None:
    child = start(limit_bytes=1 << 20)
    child.go_on()
    heard = child.hear()
    assert heard.startswith("ready ram")
    assert f" {_checksum(dataset)} " in heard
    assert f"no shared file: {tmp_path / 'cache'}" in heard
    assert "File too large; make room there" in heard
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.fixture
def tiny_set(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        for number in range(2):
            pixels = np.random.default_rng(number).integers(0, 255, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / split / f"{number}.png")
            (root / "labels" / split).mkdir(parents=True, exist_ok=True)
            (root / "labels" / split / f"{number}.txt").write_text("0 .5 .5 .4 .4\n")
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: [x, y]\n")
    return root


def _train(tiny_args: list[str], data: Path, *more: str) -> int:
    settings.update({"mlflow": False, "tensorboard": False})
    args = [*tiny_args, "--noplots", "--noval", "--epochs", "1", "--data", str(data / "data.yaml")]
    return train.main([*args, *more])


@pytest.mark.parametrize("asked", [(), ("--cache", "disk")], ids=["by default", "disk"])
def test_training_without_room_for_its_cache_goes_on_in_memory_and_says_so_in_a_line(
    tiny_args: list[str],
    tiny_set: Path,
    runs: Path,
    capsys: pytest.CaptureFixture[str],
    asked: tuple[str, ...],
) -> None:
    runs.mkdir(exist_ok=True)
    (runs / ".cache").write_text("in the way")
    assert _train(tiny_args, tiny_set, *asked) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "no shared file" in line]
    assert [line.split(":")[0] for line in lines] == ["train", "val"]
    assert all("in this process's memory" in line and str(runs / ".cache") in line for line in lines)


def test_training_by_default_keeps_both_splits_in_shared_files_and_device_without_a_gpu_is_said(
    tiny_args: list[str], tiny_set: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(tiny_args, tiny_set) == 0
    said = capsys.readouterr().out
    assert said.count("2 images decoded in ") == 2
    assert _train(tiny_args, tiny_set, "--cache", "device") == 0
    said = capsys.readouterr().out
    assert "images decoded in" not in said
    assert said.count("not on a GPU: this process uses none; ") == 2
    assert [kept.pictures for kept in kept_files(runs / ".cache")] == [2, 2]
