"""Fault 7: a kill at any moment of writing the shared pixel cache leaves a cache that is built anew."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from starling.core.files.atomic import TEMPORARY_SUFFIX
from starling.data.cache.store import ImageStore
from starling.data.dataset.dataset import Dataset, DatasetDescription
from tests.conftest import REPOSITORY

IMAGES = 6
SIZE = 32

BUILD_AND_DIE = """
import os, signal, sys
from pathlib import Path
from starling.data.dataset.dataset import Dataset, DatasetDescription
from starling.data.cache.store import ImageStore

folder, moment = Path(sys.argv[1]), sys.argv[2]

def die(*args, **named):
    os.kill(os.getpid(), signal.SIGKILL)

def progress(done, total):
    if moment == str(done):
        die()

if moment == "fsync":
    os.fsync = die
if moment == "rename":
    os.replace = die
if moment == "renamed":
    rename = os.replace
    os.replace = lambda *args, **named: (rename(*args, **named), die())
dataset = Dataset.load(DatasetDescription.from_yaml(folder / "data.yaml"), "train")
ImageStore(dataset, 32, "disk", cache_folder=folder / "cache", progress=progress)
"""


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    (tmp_path / "images").mkdir()
    for number in range(IMAGES):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 20 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [x]\n")
    return Dataset.load(DatasetDescription.from_yaml(tmp_path / "data.yaml"), "train")


@pytest.mark.parametrize("moment", ["1", str(IMAGES // 2), str(IMAGES), "fsync", "rename", "renamed"])
def test_a_kill_while_the_pixel_cache_is_written_leaves_one_that_is_rebuilt(
    dataset: Dataset, tmp_path: Path, moment: str
) -> None:
    command = [sys.executable, "-c", BUILD_AND_DIE, str(tmp_path), moment]
    killed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    cache = tmp_path / "cache"
    assert bool(list(cache.glob("*.pixels"))) == (moment == "renamed")
    store, truth = ImageStore(dataset, SIZE, "disk", cache_folder=cache), ImageStore(dataset, SIZE, "off")
    assert all(np.array_equal(store[index], truth[index]) for index in range(IMAGES))
    assert not list(cache.glob(f".*{TEMPORARY_SUFFIX}"))
