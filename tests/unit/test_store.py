"""Pictures at training size, in memory or in a shared file, and the limits that choose between them."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import app.data.store as store_module
from app.data.dataset import Dataset, DatasetDescription
from app.data.limits import container_cpu_count, container_memory_limit, container_memory_used
from app.data.store import ImageStore
from app.errors import ConfigError, DataError

SHAPES = [(20, 40), (40, 20), (16, 16), (64, 32)]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    folder = tmp_path / "set" / "images"
    folder.mkdir(parents=True)
    for number, hw in enumerate(SHAPES):
        pixels = np.random.default_rng(number).integers(0, 255, (*hw, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "set" / "data.yaml").write_text("train: images\nnames: [x]\n")
    return _load(tmp_path)


def _load(folder: Path) -> Dataset:
    return Dataset.load(DatasetDescription.from_yaml(folder / "set" / "data.yaml"), "train")


def _count_decodes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    decoded: list[Path] = []
    decode = store_module.decode_image

    def counting(path: Path) -> np.ndarray:
        decoded.append(path)
        return decode(path)

    monkeypatch.setattr(store_module, "decode_image", counting)
    return decoded


def test_longest_side_is_the_training_size_in_every_mode_and_pixels_agree(
    dataset: Dataset, tmp_path: Path
) -> None:
    stores = [
        ImageStore(dataset, 32, mode, cache_folder=tmp_path / "cache") for mode in ("ram", "disk", "off")
    ]
    for index, shape in enumerate([(16, 32), (32, 16), (32, 32), (32, 16)]):
        pictures = [store[index] for store in stores]
        assert all(picture.shape == (*shape, 3) for picture in pictures)
        assert all(np.array_equal(picture, pictures[0]) for picture in pictures)
        assert not any(picture.flags.writeable for picture in pictures)


def test_ram_decodes_each_picture_once_however_many_threads_ask(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = _count_decodes(monkeypatch)
    store = ImageStore(dataset, 32, "ram")
    threads = [threading.Thread(target=lambda: [store[i] for i in range(4)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(decoded) == 4


def test_over_the_budget_nothing_is_kept_and_the_reason_is_given(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = _count_decodes(monkeypatch)
    store = ImageStore(dataset, 32, "auto", memory_limit_bytes=store_bytes(dataset) - 1)
    assert store.mode == "off"
    assert "to spend" in store.reason
    _ = store[0], store[0]
    assert len(decoded) == 2
    assert ImageStore(dataset, 32, "auto", memory_limit_bytes=store_bytes(dataset)).mode == "ram"


def store_bytes(dataset: Dataset) -> int:
    return ImageStore(dataset, 32, "off").nbytes


def test_the_disk_file_is_built_once_and_shared(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ImageStore(dataset, 32, "disk", cache_folder=tmp_path / "cache")
    decoded = _count_decodes(monkeypatch)
    second = ImageStore(dataset, 32, "disk", cache_folder=tmp_path / "cache")
    assert np.array_equal(first[3], second[3])
    assert not decoded


def test_a_kill_while_the_cache_is_written_leaves_a_cache_that_is_rebuilt(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    key = ImageStore(dataset, 32, "off").key()
    cache.mkdir()
    leftover = cache / f".{key}.pixels.1.part"
    leftover.write_bytes(b"half")
    (cache / f"{key}.pixels").write_bytes(key.encode() + b"torn")
    store = ImageStore(dataset, 32, "disk", cache_folder=cache)
    assert np.array_equal(store[1], ImageStore(dataset, 32, "off")[1])
    assert not leftover.exists()


def test_an_edited_picture_of_the_same_size_gets_a_new_cache(dataset: Dataset, tmp_path: Path) -> None:
    old = ImageStore(dataset, 32, "disk", cache_folder=tmp_path / "cache")[2].copy()
    path = dataset.images[2]
    content = path.read_bytes()
    Image.fromarray(np.full((16, 16, 3), 9, np.uint8)).save(path)
    path.write_bytes(path.read_bytes().ljust(len(content), b"\0"))
    assert path.stat().st_size == len(content)
    new = ImageStore(_load(tmp_path), 32, "disk", cache_folder=tmp_path / "cache")[2]
    assert (new == 9).all()
    assert not np.array_equal(old, new)


def test_a_full_disk_is_told_before_writing(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        store_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 20})()
    )
    with pytest.raises(DataError, match="GiB are free"):
        ImageStore(dataset, 32, "disk", cache_folder=tmp_path / "cache")


def test_a_picture_replaced_by_another_shape_is_an_error_not_a_wrong_label(dataset: Dataset) -> None:
    store = ImageStore(dataset, 32, "ram")
    Image.new("RGB", (50, 12)).save(dataset.images[0])
    with pytest.raises(DataError, match="changed since the start"):
        _ = store[0]


def test_a_wrong_mode_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="must be one of"):
        ImageStore(dataset, 32, "dsik")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cache folder"):
        ImageStore(dataset, 32, "disk")


def _write(root: Path, files: dict[str, str]) -> None:
    for name, text in {"proc/meminfo": "MemTotal: 1000000 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_limits_are_read_from_cgroup_v2(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "536870912\n",
            "sys/fs/cgroup/memory.current": "1000\n",
            "sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 400\n",
            "sys/fs/cgroup/cpu.max": "50000 100000\n",
        },
    )
    assert container_memory_limit(tmp_path) == 536870912
    assert container_memory_used(tmp_path) == 600
    assert container_cpu_count(tmp_path) == 1


def test_limits_are_read_from_cgroup_v1_and_a_tighter_parent_counts(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory"
    _write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a/b\n",
            f"{base}/a/b/memory.limit_in_bytes": "9223372036854771712\n",
            f"{base}/a/memory.limit_in_bytes": "300000000\n",
            f"{base}/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
        },
    )
    assert container_memory_limit(tmp_path) == 300000000
    assert container_cpu_count(tmp_path) == 1


def test_without_limits_the_machine_is_the_limit(tmp_path: Path) -> None:
    _write(tmp_path, {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/cpu.max": "max 100000\n"})
    assert container_memory_limit(tmp_path) == 1024_000_000
    assert container_cpu_count(tmp_path) >= 1
