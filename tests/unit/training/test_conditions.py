"""A resume under other conditions says what has changed; under the same ones it says nothing and is bit-equal."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from starling import settings
from starling.cli import train
from starling.model.checkpoint import load_checkpoint, save_checkpoint
from starling.training.resume import conditions
from tests.conftest import MINI_SET, TINY_LAYOUT

NOTE = "this resume is not bit-equal: "


@pytest.fixture(autouse=True)
def no_tracking(runs: Path) -> None:
    """Keep the bridge out: it has tests of its own."""
    settings.update({"mlflow": False, "tensorboard": False})


@pytest.fixture(scope="module")
def world(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a copy of the small dataset and a run of two epochs on it, which all tests share."""
    root = tmp_path_factory.mktemp("world")
    shutil.copytree(tiny_data.parent, root / "now" / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STARLING_RUNS", str(root / "now" / "runs"))
        settings.update({"mlflow": False, "tensorboard": False})
        args = ["--data", str(root / "now" / "data" / tiny_data.name), "--weights", "", "--cfg", str(TINY_LAYOUT),
                "--img", "64", "--batch", "4", "--epochs", "2", "--device", "cpu", "--noplots", "--noval",
                "--cache", "off"]  # fmt: skip
        assert train.main(args) == 0
    (root / "now").rename(root / "kept")
    return root


@pytest.fixture
def whole(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the run as it ended, put where it was made."""
    now = world / "now"
    if now.exists():
        shutil.rmtree(now)
    shutil.copytree(world / "kept", now)
    monkeypatch.setenv("STARLING_RUNS", str(now / "runs"))
    return now / "runs" / "train" / "exp"


@pytest.fixture
def data(whole: Path, tiny_data: Path) -> Path:
    """Return the YAML of the dataset of the run."""
    return whole.parents[2] / "data" / tiny_data.name


@pytest.fixture
def trained(whole: Path) -> Path:
    """Return the folder of the run as if it had been stopped after its first epoch."""
    shutil.copyfile(whole / "weights" / "last.previous.pt", whole / "weights" / "last.pt")
    for name in ("summary.json", ".finished"):
        (whole / name).unlink()
    return whole


def resume(run: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """Resume the run and return what it said of its exactness."""
    capsys.readouterr()
    assert train.main(["--resume", str(run), "--json", *more]) == 0
    *lines, figures = capsys.readouterr().out.splitlines()
    said = [line for line in lines if NOTE in line]
    noted = json.loads((run / "summary.json").read_text())["notes"]
    assert [note for note in noted if NOTE in note] == [f"from epoch 2: {line}" for line in said]
    assert json.loads(figures)["notes"] == noted
    assert len(said) <= 1
    return said[0].removeprefix(NOTE) if said else ""


def test_under_the_same_conditions_a_resume_says_nothing_and_is_bit_equal(
    trained: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume(trained, capsys) == ""
    kept = world / "kept" / "runs" / "train" / "exp"
    ours, theirs = (load_checkpoint(run / "weights" / "last.pt") for run in (trained, kept))
    assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in theirs["model"])


def test_a_resume_that_only_finishes_a_run_speaks_of_its_data_alone(
    whole: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    weights = (whole / "weights" / "last.pt").read_bytes()
    for change, said in ((False, []), (True, [f"{conditions.OTHER_DATA}1 validation image removed"])):
        (whole / "summary.json").unlink()
        if change:
            next((data.parent / "images" / "val").iterdir()).unlink()
        capsys.readouterr()
        assert train.main(["--resume", str(whole)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if NOTE in line or conditions.OTHER_DATA in line] == said
        assert json.loads((whole / "summary.json").read_text())["notes"][-len(said) :] == said or not said
    assert (whole / "weights" / "last.pt").read_bytes() == weights


def test_another_number_of_threads_is_said_and_stays_in_the_report(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = load_checkpoint(trained / "weights" / "last.pt")["conditions"]["machine"]["threads"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert resume(trained, capsys) == f"threads {before} → 77"
    assert NOTE in (trained / "events.jsonl").read_text()
    assert load_checkpoint(trained / "weights" / "last.pt")["notes"]


def test_changed_added_and_removed_files_are_counted(
    trained: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sorted((data.parent / "images" / "train").iterdir())
    label = data.parent / "labels" / "train" / f"{images[0].stem}.txt"
    label.write_text(
        label.read_text().replace("0.5", "0.4", 1).replace("0.6", "0.7", 1) + "0 0.5 0.5 0.1 0.1\n"
    )
    swapped = images[1].stat()
    content = bytearray(images[1].read_bytes())
    content[len(content) // 2] ^= 1
    images[1].write_bytes(content)
    os.utime(images[1], ns=(swapped.st_atime_ns, swapped.st_mtime_ns))
    images[2].unlink()
    for number in (1, 2):
        extra = sorted((MINI_SET / "images" / "val").glob("*.jpg"))[-number]
        shutil.copyfile(extra, images[0].parent / f"new{number}.jpg")
    said = resume(trained, capsys)
    assert said == (
        "2 of 8 training files changed (1 image and 1 label file), 2 training images added, 1 training image removed"
    )


def test_each_condition_that_the_checkpoint_records_is_named_where_it_differs(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("python", "torch", "numpy", "opencv", "code", "device", "number format", "processes", "augmentation",
             "compile", "epochs", "threads", "CPU instructions")  # fmt: skip
    last = trained / "weights" / "last.pt"
    state = load_checkpoint(last)
    machine = state["conditions"]["machine"]
    assert set(machine) == set(names)
    state["conditions"]["machine"] = dict.fromkeys(names, "other")
    save_checkpoint(last, state)
    assert resume(trained, capsys) == "; ".join(f"{name} other → {machine[name]}" for name in names)


def test_other_versions_and_devices_are_named() -> None:
    table = {name: torch.zeros((1, 3), dtype=torch.int64) for name in ("train", "val")}
    before: dict[str, Any] = {"machine": {"torch": "2.8", "device": "cpu", "threads": "2"}, "data": table}
    after: dict[str, Any] = {"machine": {"torch": "2.9", "device": "H200"}, "data": table}
    assert conditions.differences(before, after, exact_kernels=True) == [
        "torch 2.8 → 2.9", "device cpu → H200", "threads 2 → none",
    ]  # fmt: skip
    assert conditions.differences(after, after, exact_kernels=True) == []
    assert "--deterministic" in conditions.differences(after, after, exact_kernels=False)[0]
    for foreign in (None, {}, {"machine": 3}, {**after, "data": {"train": 3}}, {**after, "data": []}):
        assert "does not record" in conditions.differences(foreign, after, exact_kernels=True)[0]
    early = {**after, "data": {}}
    assert "before the digests" in conditions.differences(early, after, exact_kernels=True)[0]


def test_a_changed_byte_anywhere_in_an_image_of_megabytes_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "large.bmp"
    content = bytearray(5 << 20)
    path.write_bytes(content)
    digests = {conditions._file_digest(path)}
    for position in range(70_000, len(content), 1_000_003):
        changed = bytearray(content)
        changed[position] = 1
        path.write_bytes(changed)
        digests.add(conditions._file_digest(path))
    assert len(digests) == 7


def test_huge_files_are_read_in_blocks_from_the_beginning_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditions, "WHOLE_BYTES", 1 << 20)
    path = tmp_path / "huge"
    content = bytearray(conditions.WHOLE_BYTES + 12345)
    path.write_bytes(content)
    digests = {conditions._file_digest(path)}
    for position in (0, len(content) - 1):
        changed = bytearray(content)
        changed[position] = 1
        path.write_bytes(changed)
        digests.add(conditions._file_digest(path))
    path.write_bytes(content + b"\0")
    digests.add(conditions._file_digest(path))
    assert len(digests) == 4


def test_data_that_has_moved_is_resumed_by_its_new_description(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data.parent.rename(tmp_path / "moved")
    moved = tmp_path / "moved" / data.name
    assert train.main(["--resume", str(trained)]) == 3
    hint = f"--resume {trained / 'weights' / 'last.pt'} --data NEW.yaml"
    assert hint in capsys.readouterr().err
    assert resume(trained, capsys, "--data", str(moved)) == ""
    assert load_checkpoint(trained / "weights" / "last.pt")["config"]["data"] == str(moved)


def test_data_that_is_another_is_refused_with_what_differs(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data.parent, tmp_path / "other")
    other = tmp_path / "other" / data.name
    (next((tmp_path / "other" / "labels" / "train").iterdir())).write_text("0 0.5 0.5 0.2 0.2\n")
    assert train.main(["--resume", str(trained), "--data", str(other)]) == 3
    assert "1 of 8 training files changed (1 label file)" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "other" / "labels")
    shutil.copytree(data.parent / "labels", tmp_path / "other" / "labels")
    text = other.read_text()
    other.write_text(text.replace("WBC", "White"))
    assert text != other.read_text()
    assert train.main(["--resume", str(trained), "--data", str(other)]) == 3
    assert "White" in capsys.readouterr().err
