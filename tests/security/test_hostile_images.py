"""Whatever an image file holds, it is decoded or refused, soon and in little memory."""

from __future__ import annotations

import base64
import os
import threading
from pathlib import Path

import pytest

from starling.core.errors import DataError
from starling.data.dataset.image_cost import Room
from starling.data.dataset.images import UnusableImageError, decode_image, read_header
from tests.security.conftest import Measured
from tests.security.hostile_images import HOSTILE, LARGEST, png

READ = """
import cv2
from PIL import Image
import starling.data.dataset.images
from starling.data.dataset.images import decode_image, read_header
Image.init()
def read(path):
    read_header(path)
    decode_image(path)
"""


@pytest.mark.parametrize("name", [name for name, (_, words) in HOSTILE.items() if words])
def test_a_hostile_image_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    build, words = HOSTILE[name]
    path = tmp_path / name
    path.write_bytes(build())
    with pytest.raises(DataError, match=words):
        decode_image(path)


def test_hostile_images_take_little_time_and_memory(tmp_path: Path, measured: Measured) -> None:
    for name, (build, _) in HOSTILE.items():
        (tmp_path / name).write_bytes(build())
    measured(READ, sorted(tmp_path.glob("*.*")), most_bytes=300 << 20)


def test_the_largest_image_of_each_kind_keeps_to_the_memory(tmp_path: Path, measured: Measured) -> None:
    most = 64 << 20  # a sixteenth of the real limit: the same arithmetic, in a sixteenth of the time
    for name, (cost, build) in LARGEST.items():
        (tmp_path / name).write_bytes(build(int((most / cost) ** 0.5)))
    said = measured(
        f"{READ}\nstarling.data.dataset.images.MEMORY_BYTES = {most}",
        sorted(tmp_path.glob("*.*")),
        most_bytes=most + (24 << 20),
    )
    assert said == ["taken"] * len(LARGEST)


def test_an_image_that_needs_more_memory_than_the_limit_is_refused_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("starling.data.dataset.images.MEMORY_BYTES", 1 << 20)
    for name, (cost, build) in LARGEST.items():
        (tmp_path / name).write_bytes(build(int(((1 << 20) / cost) ** 0.5 * 1.5)))
        with pytest.raises(UnusableImageError, match="MiB to decode, over 1"):
            read_header(tmp_path / name)


def test_what_is_no_regular_file_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    for path in (
        tmp_path / "fifo.jpg",
        tmp_path / "zero.jpg",
        tmp_path / f"{'n' * 300}.jpg",
        Path(f"{tmp_path}/\0.jpg"),
    ):
        with pytest.raises(UnusableImageError):
            read_header(path)
        with pytest.raises(DataError, match="cannot be read"):
            decode_image(path)


def test_threads_share_the_memory_for_large_images() -> None:
    room, together, most = Room(300 << 20), 0, []
    lock = threading.Lock()

    def decode() -> None:
        nonlocal together
        with room.taken(100 << 20):
            with lock:
                together += 1
                most.append(together)
            threading.Event().wait(0.01)
            with lock:
                together -= 1

    threads = [threading.Thread(target=decode) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 3


def test_a_served_model_refuses_a_chunk_that_claims_gigabytes() -> None:
    served_model = pytest.importorskip("starling.tracking.mlflow.served_model")
    text = base64.b64encode(HOSTILE["chunk.png"][0]()).decode()
    with pytest.raises(served_model.MlflowException, match="claims more bytes"):
        served_model._decode(text, 0)
    whole = base64.b64encode(png(20, 8, 0) + b"after its end").decode()
    assert served_model._decode(whole, 0).shape == (20, 20, 3)
