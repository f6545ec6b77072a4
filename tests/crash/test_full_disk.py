"""A full disk ends every command with 6, one message and all that was written before; or is survived with a line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from launcher.errors import ReplicaFailed
from starling import settings
from starling.cli import detect, export, train, val
from starling.cli import settings as settings_command
from starling.cli.data import main as data_command
from starling.cli.plots import main as plots_command
from starling.core.errors import DiskFull, GpuLost
from starling.core.files.folder import Folder
from starling.core.files.refusals import DiskRefused, refusal
from starling.data.fetch import archive, convert
from tests.conftest import REPOSITORY, TINY_LAYOUT

SEARCH = ["--project", "blood", "--name", "search", "--evolve", "1"]


@pytest.fixture(autouse=True)
def no_tracking(runs: Path) -> None:
    """Keep the bridge out: it has tests of its own."""
    settings.update({"mlflow": False, "tensorboard": False})


@pytest.fixture
def full_for(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function after which no file can be made whose path holds the given text."""

    def fill(text: str, code: int = errno.ENOSPC) -> None:
        whole = Folder.open

        def refuse(self: Folder, name: str, flags: int, mode: int = 0o666) -> int:
            path = self.path / name
            if text in str(path) and flags & (os.O_WRONLY | os.O_RDWR):
                raise OSError(code, os.strerror(code), str(path))
            return whole(self, name, flags, mode)

        monkeypatch.setattr(Folder, "open", refuse)

    return fill


@pytest.fixture
def quick(tiny_args: list[str]) -> list[str]:
    """Return the flags of a training of one epoch in `train/exp`, without images."""
    return [*tiny_args, "--noplots", "--noval", "--epochs", "1"]


@pytest.mark.parametrize(
    ("text", "args", "code"),
    [
        ("exp/.lock", [], errno.ENOSPC),
        ("labels_report.csv", [], errno.ENOSPC),
        (".opt.yaml", [], errno.ENOSPC),
        (".results.csv", [], errno.ENOSPC),
        (".last.pt", [], errno.EDQUOT),
        (".best.pt", [], errno.ENOSPC),
        ("study.journal", SEARCH, errno.EDQUOT),
        ("leases/0000", SEARCH, errno.ENOSPC),
        ("weights.lock", SEARCH, errno.ENOSPC),
    ],
)
def test_a_full_disk_or_quota_ends_a_training_or_a_search_with_6_by_path(
    quick: list[str],
    full_for: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    text: str,
    args: list[str],
    code: int,
) -> None:
    full_for(text, code)
    assert train.main([*quick, *args]) == 6
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert text.strip(".").partition(".part")[0] in said
    assert os.strerror(code) in said
    assert "Free some space" in said


def test_what_a_training_or_a_search_can_do_without_is_left_out_with_a_line(
    quick: list[str], runs: Path, full_for: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    for text in (".pixels", ".workers/", "events.jsonl", "views.lock", "picture.lock"):
        full_for(text)
    assert train.main([*quick, *SEARCH]) == 0
    said = capsys.readouterr()
    for words in ("no shared file", "status: ", "cannot append", "evolve files are behind"):
        lines = [line for line in (said.out + said.err).splitlines() if words in line]
        assert lines, words
        assert all("No space left on device" in line for line in lines)
    assert (runs / "blood/search/weights/best.pt").is_file()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 700 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "starling-test", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root and the right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a replica may be about to end


@pytest.mark.parametrize("search", [[], SEARCH])
def test_a_disk_that_really_fills_up_ends_with_6_and_keeps_what_was_there(
    tiny_args: list[str],
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    search: list[str],
) -> None:
    runs = small_disk / "runs"
    monkeypatch.setenv("STARLING_RUNS", str(runs))
    settings.update({"mlflow": False, "tensorboard": False})
    (runs / "mine").write_text("kept")
    with open(small_disk / "ballast", "wb") as ballast:
        ballast.write(bytes(450 << 10))
    assert train.main([*tiny_args, "--noplots", "--noval", *search]) == 6
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "Traceback" not in said
    assert (runs / "mine").read_text() == "kept"
    assert not list(runs.rglob("*.part"))
    (small_disk / "ballast").unlink()
    assert train.main([*tiny_args, "--noplots", "--noval", "--exist-ok", "--epochs", "1", "--nosave"]) == 0


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """Return the weights of a tiny training."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STARLING_RUNS", str(root / "runs"))
        settings.update({"mlflow": False, "tensorboard": False})
        args = ["--data", str(tiny_data), "--weights", "", "--cfg", str(TINY_LAYOUT), "--img", "64"]
        args += ["--batch", "4", "--epochs", "1", "--device", "cpu", "--noplots", "--noval"]
        assert train.main(args) == 0
    return root / "runs/train/exp/weights/best.pt"


@pytest.mark.parametrize("text", ["labels/", "crops/", "predictions.csv", "exp/."])
def test_a_full_disk_ends_detect_with_6(
    weights: Path,
    tiny_data: Path,
    full_for: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    text: str,
) -> None:
    full_for(text)
    args = ["--weights", str(weights), "--source", str(tiny_data.parent / "images/val"), "--img", "64"]
    args += [
        "--conf",
        "0.0001",
        "--max-det",
        "2",
        "--device",
        "cpu",
        "--save-txt",
        "--save-crop",
        "--save-csv",
    ]
    assert detect.main(args) == 6
    assert "No space left on device" in capsys.readouterr().err


def test_a_film_that_the_disk_has_no_room_for_ends_detect_with_6(
    weights: Path,
    tmp_path: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("STARLING_RUNS", str(small_disk / "runs"))
    film = cv2.VideoWriter(str(tmp_path / "film.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 12, (256, 256))
    generator = np.random.default_rng(0)
    for _ in range(30):
        film.write(generator.integers(0, 255, (256, 256, 3), np.uint8))
    film.release()
    args = [
        "--weights",
        str(weights),
        "--source",
        str(tmp_path / "film.mp4"),
        "--img",
        "64",
        "--device",
        "cpu",
    ]
    assert detect.main(args) == 6
    said = capsys.readouterr().err
    assert "film.mp4" in said
    assert "/proc/" not in said
    assert [path.name for path in (small_disk / "runs/detect/exp").iterdir()] == ["outputs.json"]


@pytest.mark.parametrize("text", ["labels/", "predictions.json", "val_batch0"])
def test_a_full_disk_ends_val_with_6(
    weights: Path,
    tiny_data: Path,
    full_for: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    text: str,
) -> None:
    full_for(text)
    args = ["--weights", str(weights), "--data", str(tiny_data), "--img", "64", "--device", "cpu"]
    assert val.main([*args, "--save-txt", "--save-json"]) == 6
    assert "No space left on device" in capsys.readouterr().err


def test_a_full_disk_ends_export_the_plots_and_the_settings_with_6(
    weights: Path, tmp_path: Path, full_for: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "w").mkdir()
    shutil.copy(weights, tmp_path / "w/best.pt")
    full_for(".part")
    out = ["--weights", str(tmp_path / "w/best.pt"), "--include", "torchscript", "--img", "64"]
    assert export.main(out) == 6
    assert plots_command([str(weights.parents[1]), "--out", str(tmp_path / "w/results.png")]) == 6
    assert settings_command.main(["mlflow=True"]) == 6
    assert capsys.readouterr().err.count("No space left on device") == 3
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["best.pt"]


def test_no_room_for_an_archive_or_for_converted_labels_is_6(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        file.writestr("a.txt", "x" * 1000)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(archive.shutil, "disk_usage", lambda path: usage._replace(free=10))
        with pytest.raises(DiskFull, match="make room"):
            archive.unpack(tmp_path / "set.zip", tmp_path / "new")

    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "data/images").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(DiskFull, match="labels"), convert._new_labels(tmp_path / "data/images"):
            pass
    assert not list((tmp_path / "data").glob(".labels*"))
    assert data_command(["cache"]) == 0


def test_the_codes_are_6_and_7_and_the_launcher_passes_them_on() -> None:
    assert (DiskFull.exit_code, GpuLost.exit_code) == (6, 7)
    for code in (6, 7):
        assert ReplicaFailed("x", code).exit_code == code


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_each_way_of_having_no_room_is_a_full_disk_and_an_unreadable_file_is_none(code: int) -> None:
    full = refusal(OSError(code, os.strerror(code), "/r/x"))
    assert isinstance(full, DiskFull)
    assert str(full).startswith("/r/x: ")
    assert isinstance(refusal(DiskRefused(errno.EIO, "Input/output error", "/r/x")), DiskFull)
    assert refusal(OSError(errno.EIO, "Input/output error", "/r/x")) is None


def test_a_local_replica_that_fills_the_disk_leaves_its_exit_code_all_the_same(small_disk: Path) -> None:
    program = REPOSITORY / "launcher/engines/local/supervisor.py"
    trainer = f"head -c 2000000 /dev/zero > {small_disk}/fill; exit 6"
    command = [sys.executable, "-I", str(program), str(small_disk / "exit"), str(small_disk / "log"), "", "0", "--",
               "sh", "-c", trainer]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    deadline = time.monotonic() + 30
    while not (small_disk / "exit").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert json.loads((small_disk / "exit").read_text())["exit_code"] == 6
    assert shutil.disk_usage(small_disk).free < 4096
