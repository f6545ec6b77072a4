"""Images at training size, in memory or in a shared file, and the limits that choose between them."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from starling.cli import data as data_command
from starling.core.cgroups import container_cpu_count, container_memory_limit, container_memory_used
from starling.core.errors import ConfigError, DataError
from starling.data.cache import pixel_folder, resized
from starling.data.cache.pixel_folder import MARGIN, kept_files, remove_idle
from starling.data.cache.store import ImageStore, StoreMode
from starling.data.dataset.dataset import Dataset, DatasetDescription

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
    decode = resized.decode_image

    def counting(path: Path) -> np.ndarray:
        decoded.append(path)
        return decode(path)

    monkeypatch.setattr(resized, "decode_image", counting)
    return decoded


def _on_disk(dataset: Dataset, tmp_path: Path, mode: StoreMode = "disk", **more: Any) -> ImageStore:
    return ImageStore(dataset, 32, mode, cache_folder=tmp_path / "cache", **more)


def _file(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "cache").glob("*.pixels")
    return path


def _rewrite(path: Path, pixels: np.ndarray) -> None:
    """Save other pixels over an image, later on the file system's clock, which may tick slowly."""
    before = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == before:
        Image.fromarray(pixels).save(path)


def _full_disk(monkeypatch: pytest.MonkeyPatch, folder: Path, capacity: int) -> None:
    """Let the disk hold `capacity` bytes of pixel files beside the margin."""

    def usage(path: Path) -> SimpleNamespace:
        return SimpleNamespace(
            free=MARGIN + capacity - sum(f.stat().st_size for f in folder.glob("*.pixels"))
        )

    monkeypatch.setattr(pixel_folder.shutil, "disk_usage", usage)


def _agrees(store: ImageStore, dataset: Dataset) -> bool:
    truth = ImageStore(dataset, store.image_size, "off")
    return all(np.array_equal(store[index], truth[index]) for index in range(len(dataset)))


def test_longest_side_is_the_training_size_in_every_mode_and_pixels_agree(
    dataset: Dataset, tmp_path: Path
) -> None:
    stores = [_on_disk(dataset, tmp_path, mode) for mode in ("ram", "disk", "off")]
    assert [store.mode for store in stores] == ["ram", "disk", "off"]
    for index, shape in enumerate([(16, 32), (32, 16), (32, 32), (32, 16)]):
        images = [store[index] for store in stores]
        assert all(image.shape == (*shape, 3) for image in images)
        assert all(np.array_equal(image, images[0]) for image in images)
        assert not any(image.flags.writeable for image in images)


def test_ram_decodes_each_image_once_however_many_threads_ask(
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
    assert "do not fit" in store.reason
    assert "raise the memory limit" in store.reason
    _ = store[0], store[0]
    assert len(decoded) == 2
    assert ImageStore(dataset, 32, "auto", memory_limit_bytes=store_bytes(dataset)).mode == "ram"


def store_bytes(dataset: Dataset) -> int:
    return ImageStore(dataset, 32, "off").nbytes


def test_the_disk_file_is_built_once_and_shared(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _on_disk(dataset, tmp_path)
    decoded = _count_decodes(monkeypatch)
    second = _on_disk(dataset, tmp_path)
    assert np.array_equal(first[3], second[3])
    assert not decoded


def test_progress_is_told_of_each_image_decoded_into_the_file(dataset: Dataset, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    for _ in range(2):
        _on_disk(dataset, tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_by_default_images_go_to_the_shared_file_where_one_can_be_kept(
    dataset: Dataset, tmp_path: Path
) -> None:
    store = _on_disk(dataset, tmp_path, "auto")
    assert store.mode == "disk"
    assert str(tmp_path / "cache") in store.reason
    assert _file(tmp_path).is_file()


def test_by_default_a_set_that_memory_could_not_hold_is_not_kept_but_disk_keeps_it(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = store_bytes(dataset)
    monkeypatch.setattr("starling.data.cache.store.container_memory_limit", lambda: size - 1)
    small = {"memory_limit_bytes": size // 2}
    by_default = _on_disk(dataset, tmp_path, "auto", **small)
    assert by_default.mode == "off"
    assert "--cache disk" in by_default.reason
    assert _on_disk(dataset, tmp_path, "disk", **small).mode == "disk"


@pytest.mark.parametrize("asked", ["auto", "disk"])
def test_where_the_folder_cannot_be_written_images_are_kept_in_memory_and_one_line_says_why(
    dataset: Dataset, tmp_path: Path, asked: StoreMode
) -> None:
    (tmp_path / "cache").write_text("a file of the user's")
    store = _on_disk(dataset, tmp_path, asked)
    assert store.mode == "ram"
    assert "\n" not in store.reason
    assert f"{tmp_path / 'cache'}" in store.reason
    assert "make room there or make it writable" in store.reason
    assert _agrees(store, dataset)
    assert (tmp_path / "cache").read_text() == "a file of the user's"


def test_neither_disk_nor_memory_leaves_decoding_each_time_and_names_both(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _full_disk(monkeypatch, tmp_path / "cache", 1 << 10)
    store = _on_disk(dataset, tmp_path, memory_limit_bytes=1)
    assert store.mode == "off"
    assert "are free" in store.reason
    assert "to spend" in store.reason
    assert not list((tmp_path / "cache").iterdir())


def test_memory_that_is_too_small_is_replaced_by_the_file(dataset: Dataset, tmp_path: Path) -> None:
    store = _on_disk(dataset, tmp_path, "ram", memory_limit_bytes=1)
    assert store.mode == "disk"
    assert "do not fit" in store.reason


def test_a_kill_while_the_cache_is_written_leaves_a_cache_that_is_rebuilt(
    dataset: Dataset, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    key = ImageStore(dataset, 32, "off").key()
    cache.mkdir()
    leftovers = [cache / f".{name}.pixels.1.part" for name in (key, "0" * 64)]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    (cache / f"{key}.pixels").write_bytes(key.encode() + b"torn")
    assert _agrees(_on_disk(dataset, tmp_path), dataset)
    assert [path.name for path in cache.iterdir()] == [f"{key}.pixels"]


def test_a_file_that_another_process_is_at_is_not_taken_for_a_leftover(
    dataset: Dataset, tmp_path: Path
) -> None:
    part = tmp_path / "cache" / f".{'0' * 64}.pixels.1.part"
    part.parent.mkdir()
    part.write_bytes(b"half")
    with pixel_folder._only_builder(part.with_name("0" * 64)):
        _on_disk(dataset, tmp_path)
        assert part.exists()


def test_who_waited_for_a_lock_that_went_does_not_build_beside_who_took_the_next(
    tmp_path: Path, said: list[str]
) -> None:
    inside: list[str] = []
    most: list[int] = []

    def build(name: str, seconds: float) -> None:
        with pixel_folder._only_builder(tmp_path / "x.pixels"):
            inside.append(name)
            most.append(len(inside))
            time.sleep(seconds)
            inside.remove(name)

    waiter = threading.Thread(target=build, args=("waiter", 0.1))
    with pixel_folder._only_builder(tmp_path / "x.pixels"):
        waiter.start()
        while not said:
            time.sleep(0.01)
    build("next", 3 * pixel_folder.POLL_S)
    waiter.join()
    assert most == [1, 1]
    assert not list(tmp_path.glob("x.*"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content + b"x",
        lambda content: b"",
        lambda content: b"x" + content[1:],
        lambda content: content[:4096] + bytes([content[4096] ^ 1]) + content[4097:],
    ],
    ids=["a byte short", "half", "a byte long", "empty", "another magic", "a checksum flipped"],
)
def test_a_file_that_is_not_whole_is_built_anew_and_this_is_said(
    dataset: Dataset, tmp_path: Path, damage: Any, said: list[str]
) -> None:
    _on_disk(dataset, tmp_path)
    path = _file(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert _agrees(_on_disk(dataset, tmp_path), dataset)
    assert said == [f"{path}: cut off or damaged; it is built anew"]
    assert path.read_bytes() == whole


def _flip(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("from_the_end", [1, 32 * 16 * 3, 32 * 16 * 3 + 1])
def test_a_flipped_byte_is_found_before_it_is_used_and_the_next_start_builds_anew(
    dataset: Dataset, tmp_path: Path, from_the_end: int, said: list[str]
) -> None:
    _on_disk(dataset, tmp_path)
    path = _file(tmp_path)
    whole = path.read_bytes()
    _flip(path, len(whole) - from_the_end)
    store = _on_disk(dataset, tmp_path)
    for _ in range(2):
        assert _agrees(store, dataset)
    assert said == [f"{path}: damaged, so removed; its damaged images are decoded anew"]
    assert not path.exists()
    assert _agrees(_on_disk(dataset, tmp_path), dataset)
    assert path.read_bytes() == whole


def test_a_file_that_was_built_anew_is_not_removed_for_the_damage_of_the_old_one(
    dataset: Dataset, tmp_path: Path
) -> None:
    _on_disk(dataset, tmp_path)
    path = _file(tmp_path)
    whole = path.read_bytes()
    _flip(path, len(whole) - 1)
    store = _on_disk(dataset, tmp_path)
    path.unlink()
    _on_disk(dataset, tmp_path)
    assert _agrees(store, dataset)
    assert path.read_bytes() == whole


def test_an_edited_image_of_the_same_bytes_and_date_gets_a_new_cache(
    dataset: Dataset, tmp_path: Path
) -> None:
    old = _on_disk(dataset, tmp_path)[2].copy()
    path = dataset.images[2]
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        Image.fromarray(np.full((16, 16, 3), 9, np.uint8)).save(path)
        path.write_bytes(path.read_bytes().ljust(before.st_size, b"\0"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    new = _on_disk(_load(tmp_path), tmp_path)[2]
    assert (new == 9).all()
    assert not np.array_equal(old, new)


def test_edited_labels_and_a_moved_dataset_keep_their_cache(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _on_disk(dataset, tmp_path)
    (tmp_path / "set" / "images" / "0.txt").write_text("0 .5 .5 .1 .1\n")
    (tmp_path / "set" / "data.yaml").write_text("train: images\nnames: [y]\n")
    (tmp_path / "set").rename(tmp_path / "moved")
    decoded = _count_decodes(monkeypatch)
    moved = Dataset.load(DatasetDescription.from_yaml(tmp_path / "moved" / "data.yaml"), "train")
    assert moved.names == ("y",)
    assert _on_disk(moved, tmp_path).mode == "disk"
    assert not decoded


def test_another_size_gets_another_file(dataset: Dataset, tmp_path: Path) -> None:
    for size in (32, 48):
        ImageStore(dataset, size, "disk", cache_folder=tmp_path / "cache")
    sizes = {kept.image_size for kept in kept_files(tmp_path / "cache")}
    assert sizes == {32, 48}


def test_an_image_that_changes_while_the_file_is_built_leaves_no_file_and_the_run_goes_on(
    dataset: Dataset, tmp_path: Path, said: list[str]
) -> None:
    _rewrite(dataset.images[2], np.full((16, 16, 3), 9, np.uint8))
    store = _on_disk(dataset, tmp_path)
    assert store.mode == "ram"
    assert f"{dataset.images[2]} changed while it was decoded; start again" in store.reason
    assert not list((tmp_path / "cache").iterdir())
    assert (store[2] == 9).all()
    assert len(said) == 1
    assert said[0].startswith(f"{dataset.images[2]}: changed since the start")


@pytest.mark.parametrize("mode", ["ram", "off"])
def test_an_image_that_changes_during_the_run_is_named_once(
    dataset: Dataset, mode: StoreMode, said: list[str]
) -> None:
    store = ImageStore(dataset, 32, mode)
    _ = store[0], store[2]
    _rewrite(dataset.images[3], np.full((64, 32, 3), 9, np.uint8))
    for _ in range(2):
        assert (store[3] == 9).all()
    assert [line.split(":")[0] for line in said] == [str(dataset.images[3])]


def test_an_image_that_changes_during_the_run_leaves_the_shared_file_as_it_was(
    dataset: Dataset, tmp_path: Path
) -> None:
    store = _on_disk(dataset, tmp_path)
    before = [store[index].copy() for index in range(4)]
    _rewrite(dataset.images[2], np.full((16, 16, 3), 9, np.uint8))
    assert all(np.array_equal(store[index], before[index]) for index in range(4))


def test_for_space_the_least_recently_used_file_that_nobody_maps_goes_first(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    folder = tmp_path / "cache"
    in_use = ImageStore(dataset, 16, "disk", cache_folder=folder)
    for size in (20, 24):
        ImageStore(dataset, size, "disk", cache_folder=folder)
    used = {16: 1, 20: 3, 24: 2}
    for kept in kept_files(folder):
        os.utime(kept.path, (used[kept.image_size or 0],) * 2)
    notes = folder / "notes.pixels"
    notes.write_text("a file of the user's")
    _full_disk(monkeypatch, folder, sum(path.stat().st_size for path in folder.glob("*.pixels")) + 8192)
    store = ImageStore(dataset, 28, "disk", cache_folder=folder)
    assert store.mode == "disk"
    assert {kept.image_size for kept in kept_files(folder)} == {16, 20, 28}
    assert len(said) == 1
    assert "least recently used" in said[0]
    assert notes.read_text() == "a file of the user's"
    assert _agrees(in_use, dataset)


def test_opening_a_file_counts_as_using_it(dataset: Dataset, tmp_path: Path) -> None:
    _on_disk(dataset, tmp_path)
    os.utime(_file(tmp_path), (1, 1))
    _on_disk(dataset, tmp_path)
    assert _file(tmp_path).stat().st_mtime > 1


def test_nothing_is_removed_for_space_where_that_would_not_suffice(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _on_disk(dataset, tmp_path)
    kept = _file(tmp_path)
    _full_disk(monkeypatch, tmp_path / "cache", kept.stat().st_size)
    larger = ImageStore(dataset, 320, "disk", cache_folder=tmp_path / "cache")
    assert larger.mode == "ram"
    assert _file(tmp_path) == kept


def test_a_full_disk_is_told_before_writing(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = _count_decodes(monkeypatch)
    _full_disk(monkeypatch, tmp_path / "cache", 1 << 10)
    store = _on_disk(dataset, tmp_path)
    assert store.mode == "ram"
    assert "are needed with some to spare" in store.reason
    assert not decoded


def test_a_link_is_neither_read_nor_written_through(dataset: Dataset, tmp_path: Path) -> None:
    key = ImageStore(dataset, 32, "off").key()
    outside = tmp_path / "outside"
    outside.write_text("a file of the user's")
    (tmp_path / "cache").mkdir()
    for suffix in ("pixels", "lock"):
        link = tmp_path / "cache" / f"{key}.{suffix}"
        link.symlink_to(outside)
        assert _on_disk(dataset, tmp_path).mode == "ram"
        link.unlink()
    assert outside.read_text() == "a file of the user's"


def test_device_is_the_shared_file_and_says_whether_the_gpu_may_have_it(
    dataset: Dataset, tmp_path: Path
) -> None:
    size = store_bytes(dataset)
    stores = {
        free: _on_disk(dataset, tmp_path, "device", device_free_bytes=free) for free in (None, size - 1, size)
    }
    assert {store.mode for store in stores.values()} == {"disk"}
    assert {free: store.on_device for free, store in stores.items()} == {
        None: False,
        size - 1: False,
        size: True,
    }
    assert stores[None].reason.startswith("not on a GPU: this process uses none")
    assert stores[size - 1].reason.startswith("not on a GPU: 0.00 GiB do not fit")
    assert stores[size].reason.startswith("on the GPU")


def test_auto_takes_the_gpu_where_there_is_room_and_is_silent_where_there_is_none(
    dataset: Dataset, tmp_path: Path
) -> None:
    size = store_bytes(dataset)
    stores = [_on_disk(dataset, tmp_path, "auto", device_free_bytes=free) for free in (None, size - 1, size)]
    assert [store.on_device for store in stores] == [False, False, True]
    assert ["GPU" in store.reason for store in stores] == [False, False, True]


def test_the_data_command_lists_files_and_removes_those_not_in_use(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache"
    in_use = _on_disk(dataset, tmp_path)
    ImageStore(dataset, 48, "disk", cache_folder=folder)
    outdated = folder / f"{'0' * 64}.pixels"
    outdated.write_bytes(b"of an older version")
    mine = folder / "mine.txt"
    mine.write_text("a file of the user's")
    leftover = folder / f".{'1' * 64}.pixels.1.part"
    leftover.write_bytes(b"half")

    def run(*arguments: str) -> Any:
        assert data_command.main(["cache", str(folder), "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    listed = {file["image_size"]: file for file in run()["files"]}
    assert {size: file["in_use"] for size, file in listed.items()} == {32: True, 48: False, None: False}
    assert listed[48]["pictures"] == 4
    report = run("--remove")
    assert {file["image_size"] for file in report["removed"]} == {48, None}
    assert [file["image_size"] for file in report["files"]] == [32]
    assert {path.name for path in folder.iterdir()} == {mine.name, f"{in_use.key()}.pixels"}
    assert data_command.main(["cache", str(folder)]) == 0
    assert "in use   " in capsys.readouterr().out


def test_without_a_folder_the_data_command_lists_nothing(tmp_path: Path) -> None:
    assert kept_files(tmp_path / "none") == []
    assert remove_idle(tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


def test_an_image_replaced_by_another_shape_is_an_error_not_a_wrong_label(dataset: Dataset) -> None:
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
            "sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 300\nactive_file 100\n",
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
            f"{base}/a/b/memory.usage_in_bytes": "1000\n",
            f"{base}/a/b/memory.stat": "inactive_file 1\ntotal_inactive_file 300\ntotal_active_file 100\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
        },
    )
    assert container_memory_limit(tmp_path) == 300000000
    assert container_memory_used(tmp_path) == 600
    assert container_cpu_count(tmp_path) == 1


def test_without_limits_the_machine_is_the_limit(tmp_path: Path) -> None:
    _write(tmp_path, {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/cpu.max": "max 100000\n"})
    assert container_memory_limit(tmp_path) == 1024_000_000
    assert container_cpu_count(tmp_path) >= 1
