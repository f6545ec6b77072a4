"""What a machine behind ssh is asked in one go, put to a real shell: this machine's."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.engines.base import ReplicaState
from launcher.hosts import ssh_host
from launcher.hosts.ssh_host import SshHost, read_files_there, read_usage_there
from launcher.hosts.this_machine import TcpHost
from launcher.hosts.usage import read_usage
from launcher.status.progress import told_by


class Shell:
    """A shell of this machine, asked as `SshConnection` asks one behind ssh."""

    url, name, ids, home, docker_socket = "ssh://machine", "machine", (5, 5), Path("/home"), Path("/s")

    def __init__(self, path: str = os.environ["PATH"]) -> None:
        self.path, self.questions = path, 0

    def ask(self, script: str) -> tuple[int, str]:
        self.questions += 1
        done = subprocess.run(
            ["sh", "-c", f"{{ {script}\n}} </dev/null 2>/dev/null"],
            env={"PATH": self.path},
            capture_output=True,
            text=True,
            timeout=20,
        )
        return done.returncode, done.stdout


def replica(name: str, runs: Path, **values: Any) -> ReplicaState:
    known: dict[str, Any] = {"id": name, "device": "cpu:0", "phase": "running"}
    return ReplicaState(name=name, fleet="a/b", plan={"runs": str(runs)}, **(known | values))


def test_files_there_are_read_in_one_question_and_links_and_pipes_never(tmp_path: Path) -> None:
    (tmp_path / "it's here").write_bytes(b"\x00\xff" * 40 + ssh_host._MARK.encode())
    (tmp_path / "private").write_text("private")
    (tmp_path / "link").symlink_to("private")
    (tmp_path / "long").write_text("x" * 200)
    os.mkfifo(tmp_path / "pipe")
    shell = Shell()
    names = ["it's here", "link", "long", "pipe", "gone"]
    found = read_files_there(shell, [tmp_path / name for name in names], 100)
    assert found is not None
    assert [found[tmp_path / name] for name in names] == [
        (tmp_path / "it's here").read_bytes(),
        b"",
        b"x" * 100,
        b"",
        b"",
    ]
    assert shell.questions == 2, "one for what it can, one for all files"


def test_a_link_in_place_of_their_folder_is_not_followed_there_either(tmp_path: Path) -> None:
    (tmp_path / "big disk/it's outside").mkdir(parents=True)
    (tmp_path / "big disk/it's outside/r.json").write_text("{}")
    (tmp_path / "runs").symlink_to("big disk")  # people keep their runs on another disk
    (tmp_path / "big disk/.workers").symlink_to("it's outside")
    paths = [tmp_path / "runs" / name / "r.json" for name in (".workers", "it's outside", "gone")]
    found = read_files_there(Shell(), paths, 100)
    assert found is not None
    assert [found[path] for path in paths] == [b"", b"{}", b""]


def test_more_files_than_one_answer_may_hold_are_asked_for_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_host, "MOST_STATUS_FILES", 2)
    paths = [tmp_path / str(number) for number in range(5)]
    for path in paths:
        path.write_text(path.name)
    assert read_files_there(Shell(), paths, 10) == {path: path.name.encode() for path in paths}


def test_a_shell_that_cannot_leave_links_alone_reads_nothing(tmp_path: Path) -> None:
    dd = tmp_path / "dd"
    dd.write_text("#!/bin/sh\nexit 1\n")
    dd.chmod(0o755)
    assert read_files_there(Shell(f"{tmp_path}:{os.environ['PATH']}"), [dd], 100) is None


def test_what_replicas_there_say_comes_by_the_shell_and_else_by_the_engine(
    tmp_path: Path,
) -> None:
    (tmp_path / ".workers").mkdir()
    (tmp_path / ".workers/a.json").write_text(json.dumps({"epoch": 3}))
    (tmp_path / ".workers/a.restarts.json").write_text(json.dumps({"restarts": 2}))
    states = [replica("a", tmp_path), replica("b", tmp_path), replica("c", tmp_path, phase="created")]

    def refuse(*words: object) -> bytes:
        raise AssertionError("the engine was asked")

    shell: Any = Shell()
    engine: Any = SimpleNamespace(host=SshHost(shell), read_file=refuse)
    told = told_by(engine, states)
    assert [(progress.epoch, restarts.done) for progress, restarts in told] == [
        (3, 2),
        (None, None),
        (None, None),
    ]

    engine.host = TcpHost()
    mounts = [{"source": str(tmp_path), "target": "/runs"}]
    states = [replica("a", tmp_path)]
    states[0].plan["mounts"] = mounts  # type: ignore[index]
    engine.read_file = lambda key, path, most: json.dumps({"epoch": 7, "restarts": 1}).encode()
    [(progress, restarts)] = told_by(engine, states)
    assert (progress.epoch, restarts.done) == (7, 1)


def test_control_groups_there_give_what_they_give_here(tmp_path: Path) -> None:
    own = Path("/proc/self/cgroup").read_text().splitlines()
    name = max((line.split(":", 2)[2] for line in own), key=len)  # in place of a container's id
    here = read_usage(os.getpid(), name)
    if name == "/" or here is None:
        pytest.skip("this process has no control group with figures")
    there = read_usage_there(
        Shell(), {name: os.getpid(), "another": os.getpid(), "gone": 2**22 + 1, "dead": 0}
    )
    assert list(there) == [name]
    usage = there[name]
    assert (usage.memory_bytes is None, usage.cpu_s is None) == (
        here.memory_bytes is None,
        here.cpu_s is None,
    )
    assert usage.cpu_s is None or here.cpu_s is None or 0 <= usage.cpu_s - here.cpu_s < 5
    assert usage.clock is not None
