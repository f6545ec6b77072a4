"""`up` makes, holds and hands over the runs folder, here and on a machine behind ssh, whoever may write it."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from launcher.devices.inventory import Machine
from launcher.errors import EngineError
from launcher.hosts import ssh_runs
from launcher.hosts.lock import NAME
from launcher.hosts.runs_folder import runs_folder
from launcher.hosts.ssh_connection import SshConnection
from launcher.hosts.ssh_runs import remote_host_lock, remote_replica_user, remote_runs_folder
from launcher.plan.dry_run import make_runs
from launcher.plan.facts import Facts
from starling.core import handover
from starling.core.errors import UsageError
from starling.core.handover import STILL
from tests.conftest import PYTHON_PATH

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root hands folders over")
USER, STRANGER = 10001, 12345


def owners(*paths: Path) -> list[int]:
    return [path.lstat().st_uid for path in paths]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


class Shell:
    """A shell of this machine, as the one that a connection keeps open on another."""

    name = "machine"

    def __init__(self, ids: tuple[int, int], path: str = os.defpath) -> None:
        self.ids = ids
        self._path = path
        self._shell = subprocess.Popen(
            ["/bin/sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"PATH": path}, text=True
        )

    def ask(
        self, script: str, limit_s: float = 20, heard: Callable[[str], None] | None = None
    ) -> tuple[int, str]:
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        self._shell.stdin.write(f"{{ {script}\n}} </dev/null 2>/dev/null\nprintf '\\n%s %s\\n' ended $?\n")
        self._shell.stdin.flush()
        said = ""
        while True:
            line = self._shell.stdout.readline()
            if line.startswith("ended "):
                return int(line.split()[1]), said.removesuffix("\n")
            said += line
            if heard:
                heard(line.removesuffix("\n"))

    def close(self) -> None:
        self._shell.communicate()


Hold = Callable[[Path, str], Any]


@pytest.fixture(params=["here", "behind ssh"])
def hold(request: pytest.FixtureRequest) -> Iterator[Callable[[Path, str], Any]]:
    """Make, hand over and hold the folder, on this machine or as it is done by a shell."""
    if request.param == "here":
        yield lambda runs, user: runs_folder(runs, user)
        return
    shell = Shell((os.geteuid(), os.getegid()), os.environ["PATH"])
    yield lambda runs, user: remote_runs_folder(cast(SshConnection, shell), runs, user)
    shell.close()


@needs_root
def test_a_new_folder_is_its_users_alone_and_one_of_roots_is_handed_over_with_all_in_it(
    hold: Hold, tmp_path: Path
) -> None:
    new, old = tmp_path / "a b/runs", tmp_path / "old"
    (old / "train").mkdir(parents=True)
    (old / "train/file").touch()
    with hold(new, f"{USER}:{USER}"), hold(old, f"{USER}:{USER}"):
        assert owners(new, old, old / "train", old / "train/file") == [USER] * 4
        assert mode(new) == 0o700
        (new / "result").touch()
    assert new.exists()


def test_a_folder_that_was_made_goes_again_when_nothing_was_started(hold: Hold, tmp_path: Path) -> None:
    user = f"{os.geteuid() or USER}:{os.getegid() or USER}"

    def fail() -> None:
        with hold(tmp_path / "runs", user):
            assert mode(tmp_path / "runs") == 0o700
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


@needs_root
def test_a_link_in_the_folder_and_set_id_bits_give_nobody_anything(hold: Hold, tmp_path: Path) -> None:
    runs, victim = tmp_path / "runs", tmp_path / "shadow"
    runs.mkdir()
    victim.touch(mode=0o600)
    os.chown(runs, USER, USER)
    (runs / "link").symlink_to(victim)
    os.link(victim, runs / "name")
    (runs / "shell").touch()
    (runs / "shell").chmod(0o4755)
    with hold(runs, f"{USER}:{USER}"):
        assert owners(victim, runs / "link") == [0, 0]
        assert mode(runs / "shell") == 0o755


def test_the_folder_that_an_ordinary_user_makes_is_that_users_alone_and_set_id_bits_in_it_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getuid", lambda: USER)  # whoever runs the tests
    with runs_folder(tmp_path / "a" / "runs", ""):
        assert mode(tmp_path / "a" / "runs") == 0o700
    (tmp_path / "a" / "runs" / "shell").touch()
    (tmp_path / "a" / "runs" / "shell").chmod(0o4755)
    with runs_folder(tmp_path / "a" / "runs", ""):
        assert mode(tmp_path / "a" / "runs" / "shell") == 0o755


def test_a_link_to_a_disk_that_is_not_mounted_is_named(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.symlink_to(tmp_path / "disk")
    with (
        pytest.raises(UsageError, match=r"is a symbolic link to .*disk, which does not exist"),
        runs_folder(runs, "10001:10001"),
    ):
        pass
    assert not (tmp_path / "disk").exists()


@needs_root
def test_somebody_elses_link_to_a_folder_of_roots_is_refused(hold: Hold, tmp_path: Path) -> None:
    (tmp_path / "roots").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "roots")
    os.lchown(tmp_path / "runs", STRANGER, STRANGER)
    with (
        pytest.raises((UsageError, EngineError), match=f"link of uid {STRANGER}"),
        hold(tmp_path / "runs", "5:5"),
    ):
        raise AssertionError("not reached")
    assert owners(tmp_path / "roots") == [0]


@needs_root
def test_a_file_system_that_knows_no_root_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.fchown", refuse)
    with (
        pytest.raises(UsageError, match="root_squash"),
        runs_folder(tmp_path / "runs", "5:5"),
    ):
        raise AssertionError("not reached")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_turns_into_one_of_the_systems_after_the_check_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to("/etc")
    with (
        pytest.raises(UsageError, match="leads to the system's folder /etc"),
        runs_folder(tmp_path / "runs", "5:5"),
    ):
        raise AssertionError("not reached")


@needs_root
def test_without_python_there_a_folder_of_roots_is_refused_and_another_works(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("stat", "mkdir", "rmdir", "base64", "cat", "flock"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    shell = Shell((0, 0), str(tools))
    runs = tmp_path / "runs"
    runs.mkdir()
    with (
        pytest.raises(EngineError, match="needs `python3` there"),
        remote_runs_folder(cast(SshConnection, shell), runs, "5:5"),
    ):
        raise AssertionError("not reached")
    os.chown(runs, 5, 5)
    with remote_runs_folder(cast(SshConnection, shell), runs, "5:5"):
        pass
    shell.close()


def test_replicas_behind_ssh_are_never_root(tmp_path: Path) -> None:
    shell = cast(SshConnection, Shell((0, 0)))
    assert remote_replica_user(shell, tmp_path / "new", None) == f"{USER}:{USER}"
    own = tmp_path.stat()
    expected = f"{USER}:{USER}" if own.st_uid == 0 else f"{own.st_uid}:{own.st_gid}"
    assert remote_replica_user(shell, tmp_path, None) == expected
    if os.geteuid() == 0:
        os.chown(tmp_path, 1000, 0)
        assert remote_replica_user(shell, tmp_path, None) == "1000:1000"
    for asked in ("0:0", "00:5", "5:0"):
        with pytest.raises(UsageError, match="never run as root"):
            remote_replica_user(shell, tmp_path, asked)
    cast(Shell, shell).close()


@pytest.mark.parametrize("way", ["flag", "file"])
def test_the_command_refuses_root_with_exit_code_2_by_flag_and_by_file(way: str, tmp_path: Path) -> None:
    words = ["--user", "00:5"] if way == "flag" else []
    if way == "file":
        (tmp_path / "starling.yaml").write_text("user: 0:5\n")
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "up", "--cpu", "1", *words, "--", "--evolve", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": PYTHON_PATH, "DOCKER_HOST": "unix:///nowhere"},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (2, 5), (
        done.stderr
    )  # 5 where no engine answers either: all that is wrong is told
    assert "never run as root" in done.stderr
    assert not (tmp_path / "runs").exists()


@needs_root
def test_the_line_that_a_dry_run_prints_hands_over_as_up_does(tmp_path: Path) -> None:
    facts = Facts(machine=Machine(cores=(0,), memory_bytes=1), runs_owner=0)
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "file").touch()
    os.link(runs / "file", tmp_path / "linked")
    [line] = make_runs(runs, "1000:1000", facts)
    done = subprocess.run(shlex.split(line), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1000 1000\n"), done.stderr
    assert owners(runs, tmp_path / "linked") == [1000, 0]
    runs.rename(tmp_path / "aside")
    assert make_runs(runs, "1000:1000", replace(facts, runs_owner=1000)) == []
    [line] = make_runs(runs, "1000:1000", replace(facts, runs_owner=None))
    subprocess.run(shlex.split(line), check=True)
    assert (owners(runs), mode(runs)) == ([1000], 0o700)


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_something_in_place_of_the_lock_of_a_machine_behind_ssh_is_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / NAME
    tmp_path.chmod(0o1777)
    monkeypatch.setattr("launcher.hosts.ssh_runs.FOLDERS", (tmp_path,))
    shell = Shell((os.getuid(), os.getgid()), os.environ["PATH"])
    {"link": lambda: place.symlink_to("nowhere"), "folder": place.mkdir, "pipe": lambda: os.mkfifo(place)}[
        kind
    ]()
    with (
        pytest.raises(EngineError, match=f"{place} on machine: not a file"),
        remote_host_lock(cast(SshConnection, shell)),
    ):
        raise AssertionError("not reached")
    place.rmdir() if kind == "folder" else place.unlink()
    with remote_host_lock(cast(SshConnection, shell)):
        assert place.is_file()
    shell.close()


@pytest.fixture
def connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshConnection]:
    """The connection itself; in place of the ssh client a shell of this machine."""
    (tmp_path / "bin").mkdir()
    client = tmp_path / "bin/ssh"
    client.write_text('#!/bin/sh\nfor word; do :; done\n[ "$word" = "exec sh" ] && exec sh\nexit 1\n')
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{client.parent}:{os.environ['PATH']}")
    connection = SshConnection("ssh://machine")
    yield connection
    connection.close()


def test_an_answer_that_goes_on_is_waited_for_and_silence_is_not(connection: SshConnection) -> None:
    said: list[tuple[str, float]] = []
    began = time.monotonic()
    script = "for n in 1 2 3 4; do echo line $n; sleep 0.3; done; printf end"
    code, answer = connection.ask(
        script, limit_s=0.8, heard=lambda line: said.append((line, time.monotonic()))
    )
    assert (code, answer) == (0, "line 1\nline 2\nline 3\nline 4\nend")
    assert [line for line, _ in said] == ["line 1", "line 2", "line 3", "line 4", "end"]
    assert said[0][1] - began < 0.8, "each line as it comes"
    with pytest.raises(EngineError, match="no answer over ssh in time"):
        connection.ask("echo x; sleep 5", limit_s=0.3, heard=lambda line: None)


@needs_root
def test_a_long_hand_over_is_told_while_it_goes_on(
    connection: SshConnection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    for name in range(5):
        (runs / str(name)).touch()
    program = ssh_runs.handover_program()
    hasty = program.replace("FIRST_S, EACH_S = 2.0, 10.0", "FIRST_S, EACH_S = 0.0, 0.0")
    assert hasty != program
    monkeypatch.setattr(ssh_runs, "handover_program", lambda: hasty)
    with remote_runs_folder(connection, runs, f"{USER}:{USER}"):
        pass
    assert said == [f"{STILL} {runs}: {count} files so far" for count in range(1, 6)]
    said.clear()
    monkeypatch.setattr(handover, "FIRST_S", 0.0)
    monkeypatch.setattr(handover, "EACH_S", 0.0)
    with runs_folder(runs, f"{USER}:{USER}"):
        pass
    assert said == [f"{STILL} {runs}: {count} files so far" for count in range(1, 6)]
