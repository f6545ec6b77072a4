"""Fault 15: the machine has no memory left for those who prepare the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from starling.core.worker_status import FOLDER
from starling.data.dataset import images
from starling.data.dataset.images import decode_image, read_header
from tests.crash.conftest import Start

SIDE = 9000
"""232 MiB as RGB, 10 MB as a file of one bit a pixel."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A dataset of two images to train on, one of them enormous and fine, and one to validate on."""
    for name, size in (("train/big", (SIDE, SIDE)), ("train/small", (64, 48)), ("val/small", (64, 48))):
        for kind, suffix in (("images", ".png"), ("labels", ".txt")):
            path = tmp_path / "set" / kind / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "images":
                Image.new("1", size).save(path, compress_level=1)
            else:
                path.write_text("0 .5 .5 .4 .4\n")
    description = tmp_path / "set" / "data.yaml"
    description.write_text("train: images/train\nval: images/val\nnames: [x]\n")
    return description


def test_a_data_thread_without_memory_ends_the_training_with_a_hint_and_the_status_says_so(
    start: Start, tiny_args: list[str], runs: Path, data: Path
) -> None:
    image = data.parent / "images" / "train" / "big.png"
    before = image.read_bytes()
    args = [
        *tiny_args,
        "--data",
        str(data),
        "--noplots",
        "--noautoanchor",
        "--workers",
        "2",
        "--cache",
        "off",
    ]
    trainer = start([*args, "--epochs", "1"], ("scarce_memory", "150"))
    assert trainer.wait() == 1, trainer.output
    message = trainer.output.splitlines()[-1]
    assert message.startswith(f"error: out of memory ({image}: no room to decode its {SIDE} x {SIDE} pixels)")
    assert "fewer --workers" in message
    assert "Traceback" not in trainer.output
    (status,) = (runs / FOLDER).glob("*.json")
    told = json.loads(status.read_text())
    assert told["phase"] == "failed"
    assert told["lasting"] is True
    assert told["message"].startswith(f"MemoryError: {image}")
    assert image.read_bytes() == before
    enough = start([*args, "--epochs", "1", "--exist-ok"], ("scarce_memory", "2000"))
    assert enough.wait() == 0, enough.output


def test_an_image_there_is_no_memory_for_is_never_called_damaged(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = data.parent / "images" / "train" / "small.png"

    def refuse(*given: object) -> None:
        raise MemoryError

    for name in ("_pixels", "_imdecode"):
        with monkeypatch.context() as patch:
            patch.setattr(images, name, refuse)
            with pytest.raises(MemoryError):
                decode_image(image)
    monkeypatch.setattr(images, "_check_end", refuse)
    with pytest.raises(MemoryError):
        read_header(image)
