"""Completion in real shells: the printed script is loaded, and asked what it would suggest."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.devices.devices import Device
from launcher.engines.base import ReplicaSpec
from launcher.engines.local.local import LocalEngine
from tests.conftest import PYTHON_PATH

BASH = """
eval "$(launcher completion bash)"
COMP_WORDS=({words}); COMP_CWORD=$(({count} - 1))
$(complete -p launcher | sed 's/.*-F \\([^ ]*\\).*/\\1/') launcher
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LocalEngine]:
    """One replica of ours, created and never started."""
    runs = tmp_path / "runs"
    runs.mkdir()
    engine = LocalEngine(runs, os.getuid())
    spec = ReplicaSpec(name="blood-search-cpu0", fleet="blood/search", device=Device("cpu", "0"), image="", image_id="",
                       command=("true",), environment={}, runs=runs)  # fmt: skip
    engine.create(spec)
    yield engine
    for state in engine.list():
        engine.remove(state.id)


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script in a shell that finds `launcher` on its PATH, in a folder of its own."""
    program = tmp_path / "bin/launcher"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH={PYTHON_PATH} exec {sys.executable} -m launcher "$@"\n')
    program.chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("STARLING_")}

    def run(script: str, shell: str = "bash", **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [shell, "-c", script],
            cwd=tmp_path,
            env={
                **clean,
                "PATH": f"{program.parent}:{os.environ['PATH']}",
                "HOME": str(tmp_path),
                **environment,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def in_bash(
    shell: Callable[..., subprocess.CompletedProcess[str]], *words: str, **environment: str
) -> list[str]:
    """Return what bash would offer for the last word."""
    script = BASH.format(words=" ".join(f"'{word}'" for word in ("launcher", *words)), count=len(words) + 1)
    done = shell(script, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_bash_completes_commands_flags_choices_and_names(
    engine: LocalEngine, shell: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    assert in_bash(shell, "ki") == ["kill", "kill-all"]
    assert in_bash(shell, "up", "--gp") == ["--gpus"]
    assert in_bash(shell, "up", "--engine", "") == ["docker", "podman", "local"]
    names = ["blood-search-cpu0", "blood/search"]
    assert in_bash(shell, "logs", "--engine", "local", "") == names
    assert in_bash(shell, "attach", "bl", STARLING_ENGINE="local") == names
    assert in_bash(shell, "stop", "blood/search", "bl", STARLING_ENGINE="local") == names[:1]


def test_the_file_of_settings_counts_in_completion_and_a_bad_one_is_silent(
    engine: LocalEngine, shell: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "starling.yaml").write_text("engine: local\n")
    assert in_bash(shell, "kill", "blood-") == ["blood-search-cpu0"]
    (tmp_path / "starling.yaml").write_text("engin: local\n")
    assert in_bash(shell, "kill", "--js", DOCKER_HOST=f"unix://{tmp_path}/none") == ["--json"]


@pytest.mark.parametrize("engine_is", ["absent", "hung", "behind ssh"])
def test_an_engine_that_does_not_answer_costs_a_moment_and_no_message(
    engine_is: str, shell: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        if engine_is == "hung":
            listener.bind(str(path))
            listener.listen()
        start = time.monotonic()
        host = "ssh://nobody@192.0.2.1" if engine_is == "behind ssh" else f"unix://{path}"
        assert in_bash(shell, "stop", "", DOCKER_HOST=host) == []
    assert time.monotonic() - start < 4.5  # two starts of Python, and the second that a suggestion may take


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_each_script_is_one_that_its_shell_accepts(
    name: str, shell: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    if shutil.which(name) is None:
        assert f"{name}_complete" in shell(f"launcher completion {name}").stdout
        pytest.skip(f"{name} is not installed")
    load = {
        "bash": 'eval "$(launcher completion bash)"; complete -p launcher',
        "zsh": 'autoload -U compinit; compinit -u; eval "$(launcher completion zsh)"; echo $_comps[launcher]',
        "fish": "launcher completion fish | source; complete -C 'launcher ki'",
    }
    done = shell(load[name], name)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("kill-all" if name == "fish" else "_launcher_completion") in done.stdout
