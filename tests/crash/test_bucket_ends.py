"""The copy to `--bucket` at the end of a training: cut short, refused or without room, it is made by a resume."""

from __future__ import annotations

import filecmp
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from starling import settings
from starling.cli import train
from starling.outputs.bucket import result_files
from tests.conftest import TINY_LAYOUT
from tests.crash.conftest import Start

LIMITS = ("20000", "300000")
"""Bytes beyond which no file may grow: one stops the copy at its first file, a curve, the other at `labels.jpg`."""


@pytest.fixture(autouse=True)
def no_tracking(runs: Path) -> None:
    """Keep the bridge out: it has tests of its own."""
    settings.update({"mlflow": False, "tensorboard": False})


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    return tmp_path / "bucket"


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a whole training, drawn and told, that was given no bucket."""
    runs = tmp_path_factory.mktemp("alone") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STARLING_RUNS", str(runs))
        settings.update({"mlflow": False, "tensorboard": False})
        args = [
            "--data",
            str(tiny_data),
            "--weights",
            "",
            "--cfg",
            str(TINY_LAYOUT),
            "--img",
            "64",
            "--batch",
            "4",
        ]
        assert train.main([*args, "--epochs", "1", "--device", "cpu", "--name", "one"]) == 0
    return runs / "train" / "one"


@pytest.fixture
def undelivered(trained: Path, runs: Path) -> Path:
    """Return the folder of a run whose results are made and told, and not yet copied."""
    run = runs / "train" / "one"
    shutil.copytree(trained, run)
    (run / ".finished").unlink()
    return run


def copy_again(run: Path, bucket: Path) -> int:
    return train.main(["--resume", str(run), "--bucket", f"file://{bucket}"])


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def assert_none_is_cut(run: Path, bucket: Path) -> None:
    """Assert that whatever has a result's name in the bucket is that result."""
    for path in files(bucket):
        if not path.name.startswith("."):
            source = run / path.relative_to(bucket / "train" / "one")
            assert filecmp.cmp(source, path, shallow=False), path


def assert_made_by_a_resume(run: Path, bucket: Path) -> None:
    assert not (run / ".finished").exists()
    assert copy_again(run, bucket) == 0
    assert_none_is_cut(run, bucket)
    copied = {path.relative_to(bucket / "train" / "one") for path in files(bucket)}
    assert copied == {path.relative_to(run) for path in result_files(run)}
    assert (run / ".finished").is_file()
    assert copy_again(run, bucket) == 2


@pytest.mark.parametrize("limit", LIMITS)
def test_a_copy_that_a_kill_cut_short_leaves_no_cut_file_and_is_made_by_a_resume(
    undelivered: Path, bucket: Path, start: Start, limit: str
) -> None:
    args = ["--resume", str(undelivered), "--bucket", f"file://{bucket}"]
    trainer = start(args, ("die_of_size", limit))
    assert trainer.wait() == -signal.SIGXFSZ, trainer.output
    assert [path.stat().st_size for path in files(bucket) if path.suffix == ".part"] == [int(limit)]
    assert_none_is_cut(undelivered, bucket)
    assert_made_by_a_resume(undelivered, bucket)


@pytest.mark.parametrize("limit", LIMITS)
def test_a_bucket_without_room_is_a_line_and_keeps_no_cut_file(
    undelivered: Path, bucket: Path, start: Start, limit: str
) -> None:
    trainer = start(["--resume", str(undelivered), "--bucket", f"file://{bucket}"], ("full_disk", limit))
    assert trainer.wait() == 0, trainer.output
    said = [line for line in trainer.output.splitlines() if line.startswith("--bucket")]
    assert len(said) == 1
    assert "File too large" in said[0]
    assert str(undelivered) in said[0]
    assert all(not path.name.startswith(".") for path in files(bucket))
    assert_none_is_cut(undelivered, bucket)
    assert_made_by_a_resume(undelivered, bucket)


@pytest.fixture
def read_only(bucket: Path) -> Iterator[Path]:
    """Mount a file system that refuses every write where the bucket is."""
    bucket.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "starling-test", str(bucket)], capture_output=True
    ).returncode:
        pytest.skip("mounting a file system needs root and the right to mount")
    yield bucket
    subprocess.run(["umount", "--lazy", str(bucket)], check=False)


def test_a_bucket_that_refuses_is_a_line_each_time_and_never_called_copied(
    undelivered: Path, read_only: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert copy_again(undelivered, read_only) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--bucket")]
        assert len(said) == 1
        assert "0 files copied, then OSError: [Errno 30] Read-only file system" in said[0]
    subprocess.run(["umount", str(read_only)], check=True)
    assert_made_by_a_resume(undelivered, read_only)


def test_a_kill_at_any_write_of_the_delivery_leaves_nothing_behind_that_a_resume_does_not_sweep(
    undelivered: Path, trained: Path, bucket: Path, start: Start
) -> None:
    untouched = undelivered.with_name("untouched")
    undelivered.rename(untouched)
    names = {path.relative_to(trained) for path in files(trained)}
    kills = 0
    while True:
        shutil.rmtree(undelivered, ignore_errors=True)
        shutil.copytree(untouched, undelivered)
        args = ["--resume", str(undelivered), "--bucket", f"file://{bucket}"]
        trainer = start(args, ("die_in_the_end", "0", str(kills + 1)))
        if trainer.wait() == 0:
            break
        assert trainer.wait() == -signal.SIGKILL, trainer.output
        kills += 1
        whole = (undelivered / ".finished").exists()
        assert copy_again(undelivered, bucket) == (2 if whole else 0)
        assert {path.relative_to(undelivered) for path in files(undelivered)} == names
        assert_none_is_cut(undelivered, bucket)
    assert kills > len(list(result_files(trained))), "a rename for each copy, and the mark"
