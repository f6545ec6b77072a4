"""What surrounds a command may be missing: its current folder, its user's name, a place to keep compiled code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from starling import compiled, settings
from starling.cli import train
from starling.cli.command import run_command
from tests.conftest import PYTHON_PATH

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "words",
    [
        ("app/val.py", "--weights", "x.pt"),
        ("-m", "launcher", "status", "--engine", "local"),
        ("-m", "launcher", "clean", "--dry-run", "--engine", "local"),
    ],
)
def test_a_current_folder_that_was_removed_is_exit_2_with_one_message(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    path = str(ROOT / words[0]) if words[0].endswith(".py") else words[0]
    command = "import os, sys; os.rmdir(os.getcwd()); os.execv(sys.argv[1], sys.argv[1:])"
    environment = {name: value for name, value in os.environ.items() if name != "STARLING_RUNS"}
    done = subprocess.run(
        [sys.executable, "-c", command, sys.executable, path, *words[1:]],
        cwd=gone,
        env={**environment, "PYTHONPATH": PYTHON_PATH},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the current folder has been removed")
    assert done.stderr.count("\n") == 1


def test_a_user_without_a_name_is_called_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr("getpass.getuser", nobody)
    monkeypatch.setenv("USER", "")
    seen: list[str] = []
    assert run_command(lambda: None, lambda _: seen.append(os.environ["USER"]), lambda _: False) == 0
    assert seen == [f"uid{os.getuid()}"]


def test_code_that_can_be_kept_nowhere_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba import njit as whole

    def without_a_place(**options: Any) -> Any:
        def decorate(function: Any) -> Any:
            if options.get("cache"):
                raise RuntimeError("cannot cache function: no locator available")
            return whole(**options)(function)

        return decorate

    monkeypatch.setattr("starling.compiled.njit", without_a_place)

    @compiled.compiled(error_model="numpy")
    def double(value: int) -> int:
        return 2 * value

    assert double(21) == 42


def test_a_runs_folder_on_a_disk_that_is_not_mounted_is_exit_2_and_named(
    tiny_args: list[str], runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings.update({"mlflow": False, "tensorboard": False})
    runs.rename(tmp_path / "kept")
    runs.symlink_to(tmp_path / "disk" / "runs")
    assert train.main([*tiny_args, "--noplots", "--noval", "--epochs", "1"]) == 2
    said = capsys.readouterr().err
    assert f"{runs}: results cannot be written here (is a symbolic link to {tmp_path}/disk/runs" in said
    assert "is that disk mounted?" in said
    assert not (tmp_path / "disk").exists()
