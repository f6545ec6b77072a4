"""Completion of the trainer's words, for `starling` in a real shell and for what follows `launcher up --`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from starling.__main__ import COMMANDS
from tests.conftest import PYTHON_PATH

BASH = """
eval "$({program} completion bash)"
COMP_WORDS=({words}); COMP_CWORD=$(({count} - 1))
$(complete -p {program} | sed 's/.*-F \\([^ ]*\\).*/\\1/') {program}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Return a folder of the two commands, for a shell's PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("starling", "launcher"):
        program = folder / name
        program.write_text(f'#!/bin/sh\nPYTHONPATH={PYTHON_PATH} exec {sys.executable} -m {name} "$@"\n')
        program.chmod(0o755)
    return folder


def completed(programs: Path, *words: str) -> list[str]:
    """Return what bash would offer for the last word."""
    script = BASH.format(program=words[0], words=" ".join(f"'{word}'" for word in words), count=len(words))
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(programs)}
    done = subprocess.run(
        ["bash", "-c", script], cwd=programs, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_bash_completes_the_commands_of_starling(programs: Path) -> None:
    assert completed(programs, "starling", "") == sorted(COMMANDS)
    assert completed(programs, "starling", "tra") == ["track", "train"]


def test_bash_completes_flags_and_their_choices(programs: Path) -> None:
    assert completed(programs, "starling", "train", "--img", "320", "--opt") == ["--optimizer"]
    assert completed(programs, "starling", "train", "--optimizer", "A") == ["Adam", "AdamW"]
    assert completed(programs, "starling", "train", "--cache", "=", "d") == ["disk", "device"]
    assert completed(programs, "starling", "export", "--include", "") == ["torchscript", "onnx"]


def test_bash_completes_subcommands_and_their_flags(programs: Path) -> None:
    assert completed(programs, "starling", "search", "") == ["show", "report", "import", "repair"]
    assert completed(programs, "starling", "search", "import", "x.csv", "--e") == ["--epochs"]
    assert completed(programs, "starling", "completion", "") == ["bash", "zsh", "fish"]


def test_bash_completes_the_training_that_launcher_up_starts(programs: Path) -> None:
    assert completed(programs, "launcher", "up", "--cpu", "2", "--", "--ev") == ["--evolve"]
    assert completed(programs, "launcher", "up", "--", "--evolve", "9", "--sampler", "c") == ["classic"]
