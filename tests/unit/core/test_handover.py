"""A runs folder of root's is handed over by descriptor: who may write it cannot make anything else change hands."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from starling.core import handover
from starling.core.files.folder import Folder
from starling.core.handover import (
    STILL,
    Refused,
    allowed_user,
    hand_over,
    open_top,
    strip_set_ids,
    take,
    user_for,
)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root hands folders over")
USER, STRANGER = 10001, 12345


def owners(*paths: Path) -> list[int]:
    return [path.lstat().st_uid for path in paths]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def give(runs: Path, uid: int = USER) -> handover.Account:
    with Folder.resolve(runs) as top:
        return hand_over(top, uid, uid)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A runs folder of root's with a run in it, as replicas of older versions left it."""
    folder = tmp_path / "runs"
    (folder / "train/exp/weights").mkdir(parents=True)
    (folder / "train/exp/weights/last.pt").write_text("weights")
    (folder / "train/exp/secret").touch(mode=0o600)
    return folder


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of root's that nobody else may read."""
    path = tmp_path / "host/shadow"
    path.parent.mkdir()
    path.touch(mode=0o600)
    return path


@needs_root
def test_all_that_is_roots_is_handed_over_and_the_files_of_others_stay_theirs(runs: Path) -> None:
    theirs = runs / "train/notes.txt"
    theirs.touch()
    os.chown(theirs, STRANGER, STRANGER)
    account = give(runs)
    assert {*owners(runs, *runs.rglob("*"))} == {USER, STRANGER}
    assert owners(theirs) == [STRANGER]
    assert account.lines() == []
    assert give(runs).handed == 0


@needs_root
@pytest.mark.parametrize(("before", "after"), [(0o755, 0o700), (0o750, 0o700), (0o2775, 0o2775)])
def test_a_folder_of_roots_becomes_its_users_alone_unless_it_is_shared_on_purpose(
    runs: Path, before: int, after: int
) -> None:
    runs.chmod(before)
    give(runs)
    assert mode(runs) == after
    runs.chmod(0o755)
    give(runs)
    assert mode(runs) == 0o755, "who opens it again is obeyed"


@needs_root
def test_a_folder_for_everybody_stays_roots(runs: Path) -> None:
    runs.chmod(0o1777)
    with pytest.raises(Refused, match=r"world-writable folder.*a new folder below it"):
        give(runs)
    assert owners(runs, runs / "train") == [0, 0]


@needs_root
def test_a_folder_of_another_user_is_handed_to_nobody(runs: Path) -> None:
    os.chown(runs, STRANGER, STRANGER)
    give(runs)
    assert owners(runs, runs / "train") == [STRANGER, 0]


@needs_root
def test_a_link_swapped_in_at_the_last_moment_gives_nothing_away(
    runs: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the opening: the worst moment for a change by path."""
    real = Folder.open

    def swap(self: Folder, name: str, flags: int, mode: int = 0o666) -> int:
        os.rename(name, name + "-aside", src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        os.symlink(victim if name != "weights" else victim.parent, name, dir_fd=self.descriptor)
        return real(self, name, flags, mode)

    monkeypatch.setattr(Folder, "open", swap)
    give(runs)
    assert owners(victim, victim.parent) == [0, 0]
    assert mode(victim) == 0o600


@needs_root
def test_a_name_swapped_after_the_opening_changes_what_was_opened_and_nothing_else(
    runs: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fstat
    swapped = []

    def swap(descriptor: int) -> os.stat_result:
        state = real(descriptor)
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if place.name == "last.pt" and not swapped:
            swapped.append(place)
            place.rename(place.with_name("aside"))
            place.symlink_to(victim)
        return state

    monkeypatch.setattr("os.fstat", swap)
    give(runs)
    assert owners(victim) == [0]
    assert owners(swapped[0].with_name("aside")) == [USER]


@contextlib.contextmanager
def racing_replica(folder: Path, victim: Path) -> Iterator[None]:
    """Somebody with a replica's uid who swaps a file and a folder for links, as fast as that can be done."""
    attacker = os.fork()
    if attacker == 0:
        os.chdir(folder)
        os.setgroups([])
        os.setgid(USER)
        os.setuid(USER)
        while True:
            for name, lure in (("file", victim), ("folder", victim.parent)):
                with contextlib.suppress(OSError):
                    os.rename(name, f"{name}-aside")
                    os.symlink(lure, name)
                    os.unlink(name)
                    os.rename(f"{name}-aside", name)
    try:
        yield
        assert os.waitpid(attacker, os.WNOHANG) == (0, 0), "the attacker has died"
    finally:
        os.kill(attacker, signal.SIGKILL)
        os.waitpid(attacker, 0)


@needs_root
def test_a_replica_that_swaps_links_as_fast_as_it_can_gains_nothing(runs: Path, victim: Path) -> None:
    theirs = runs / "theirs"
    (theirs / "folder").mkdir(parents=True)
    (theirs / "file").write_text("x")
    os.chown(theirs, USER, USER)
    until = time.monotonic() + 1.5
    with racing_replica(theirs, victim):
        while time.monotonic() < until:
            give(runs)
            for name in ("file", "folder"):
                with contextlib.suppress(OSError):
                    os.chown(theirs / name, 0, 0, follow_symlinks=False)
            os.chown(runs, 0, 0)
            assert owners(victim, victim.parent) == [0, 0]


@needs_root
@pytest.mark.parametrize("where", ["train", "theirs"])
def test_a_hard_link_to_a_file_of_the_hosts_changes_neither_owner_nor_mode(
    runs: Path, victim: Path, where: str
) -> None:
    program = victim.with_name("sudo")
    program.touch()
    program.chmod(0o4755)
    (runs / where).mkdir(exist_ok=True)
    if where == "theirs":
        os.chown(runs / where, USER, USER)
    for file in (victim, program):
        os.link(file, runs / where / file.name)
    account = give(runs)
    assert owners(victim, program) == [0, 0]
    assert mode(program) == 0o4755
    assert "find / -samefile" in "".join(account.lines())


@needs_root
def test_a_private_file_of_roots_that_a_replica_moved_into_its_own_folder_stays_roots(
    runs: Path, victim: Path
) -> None:
    (runs / "theirs").mkdir()
    os.chown(runs / "theirs", USER, USER)
    victim.rename(runs / "theirs/moved")
    (runs / "theirs/results.csv").touch(mode=0o644)
    account = give(runs)
    assert owners(runs / "theirs/moved", runs / "theirs/results.csv") == [0, USER]
    assert "its owner stays" in account.lines()[0]


@needs_root
def test_links_pipes_sockets_and_devices_are_never_touched_nor_opened(
    runs: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(runs / "pipe")
    (runs / "link").symlink_to(victim)
    os.mknod(runs / "disk", stat.S_IFBLK | 0o666, os.makedev(7, 250))
    monkeypatch.chdir(runs)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    account = give(runs)
    assert owners(runs / "pipe", runs / "link", runs / "disk", runs / "socket", victim) == [0] * 5
    assert "is a device node" in account.lines()[0]


@needs_root
def test_set_id_bits_go_whosever_the_file_is(runs: Path) -> None:
    for uid in (0, USER, STRANGER):
        for bits in (0o4755, 0o2755, 0o6711):
            program = runs / f"shell-{uid}-{bits:o}"
            program.touch()
            os.chown(program, uid, uid)
            program.chmod(bits)
    account = give(runs)
    assert {mode(path) for path in runs.glob("shell-*")} == {0o755, 0o711}
    assert account.lines() == ["9 files lost their set-user-id or set-group-id bit"]


@needs_root
def test_a_replicas_program_does_not_keep_its_bits_behind_a_second_name(runs: Path) -> None:
    program = runs / "shell"
    program.touch()
    os.chown(program, USER, USER)
    program.chmod(0o4755)
    os.link(program, runs / "train/shell")
    give(runs)
    assert mode(program) == 0o755


@needs_root
def test_capabilities_of_files_go_too(runs: Path) -> None:
    program = runs / "shell"
    shutil.copy("/bin/true", program)
    os.chown(program, USER, USER)
    capability = bytes.fromhex("0100000280000000000000000000000000000000")  # cap_setuid=ep
    os.setxattr(program, "security.capability", capability)
    give(runs)
    assert "security.capability" not in os.listxattr(program)


def test_an_ordinary_user_strips_the_files_that_are_that_users(tmp_path: Path) -> None:
    program = tmp_path / "a/shell"
    program.parent.mkdir()
    program.touch()
    program.chmod(0o4755)
    with Folder.resolve(tmp_path) as top:
        assert strip_set_ids(top, limit_s=-1).stripped == 0, "the search ends in time"
        assert strip_set_ids(top).stripped == 1
    assert mode(program) == 0o755


@needs_root
def test_what_is_mounted_below_is_no_part_of_the_folder(runs: Path, victim: Path) -> None:
    (runs / "data").mkdir()
    (runs / "hyp.yaml").touch()
    script = (
        f"mount --bind {victim.parent} {runs}/data && mount --bind {victim} {runs}/hyp.yaml && "
        f"{sys.executable} -I {handover.__file__} {runs} {USER}:{USER}"
    )
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert owners(victim, victim.parent, runs, runs / "train") == [0, 0, USER, USER]


@needs_root
def test_a_file_system_that_lets_root_change_nothing_is_a_refusal_with_a_remedy_and_never_root(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.chown", refuse)
    with pytest.raises(Refused, match=r"root_squash.*never run as root.*--user UID:GID"):
        give(runs)


@needs_root
def test_an_interrupted_handover_is_begun_again(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("os.fchown", interrupt)
        with pytest.raises(KeyboardInterrupt):
            give(runs)
    assert take(runs, None)[0] == (USER, USER)
    assert {*owners(runs, *runs.rglob("*"))} == {USER}


@pytest.mark.parametrize("user", [(0, 5), (5, 0), (0, 0), (-1, 5), (2**32, 5), (2**32 - 1, 5), (5, 2**31)])
def test_root_is_no_replicas_user_by_any_number(user: tuple[int, int]) -> None:
    assert not allowed_user(*user)
    assert allowed_user(1000, 100)


def test_replicas_of_a_folder_run_as_its_owner_and_never_in_roots_group() -> None:
    def owned(uid: int, gid: int) -> os.stat_result:
        return os.stat_result((0, 0, 0, 0, uid, gid, 0, 0, 0, 0))

    assert user_for(owned(0, 0)) == user_for(owned(0, 7)) == (USER, USER)
    assert user_for(owned(1000, 100)) == (1000, 100)
    assert user_for(owned(1000, 0)) == (1000, 1000)


@needs_root
def test_a_missing_folder_is_made_for_its_user_alone(tmp_path: Path) -> None:
    assert take(tmp_path / "a/runs", None)[0] == (USER, USER)
    assert owners(tmp_path / "a/runs", tmp_path / "a") == [USER, 0]
    assert mode(tmp_path / "a/runs") == 0o700


@needs_root
def test_somebody_elses_link_leads_root_to_no_folder_of_roots(tmp_path: Path) -> None:
    (tmp_path / "roots").mkdir()
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", STRANGER, STRANGER)
    for target in ("roots", "theirs"):
        for maker in (0, STRANGER):
            link = tmp_path / f"{target}-{maker}"
            link.symlink_to(target if maker else tmp_path / target)
            os.lchown(link, maker, maker)
    for allowed in ("roots-0", "theirs-0", f"theirs-{STRANGER}"):
        open_top(tmp_path / allowed).close()
    open_top(tmp_path / f"roots-{STRANGER}", trusted=(STRANGER,)).close()
    with pytest.raises(Refused, match=rf"uid {STRANGER} leads to {tmp_path}/roots"):
        open_top(tmp_path / f"roots-{STRANGER}")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(Refused, match="too many links"):
        open_top(tmp_path / "loop")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_top(tmp_path / "nowhere")


@needs_root
def test_the_person_behind_a_rootless_engines_root_is_not_run_as(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(handover, "_person_behind_root", lambda: 1000)
    assert handover.main([str(tmp_path)]) == 2
    assert "--userns keep-id" in capsys.readouterr().err
    assert owners(tmp_path) == [0]


@needs_root
@pytest.mark.parametrize("user", ["0:5", "00:5", "5:0", "4294967296:5"])
def test_the_program_refuses_root(user: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert handover.main([str(tmp_path), user]) == 2
    assert "never as root" in capsys.readouterr().err


class Clock:
    """A clock that goes on by a second each time that somebody looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.mark.parametrize("walk", ["hand over", "strip"])
def test_a_long_walk_says_so_after_two_seconds_and_then_every_ten(
    tmp_path: Path, walk: str, said: list[str]
) -> None:
    if walk == "hand over" and os.geteuid() != 0:
        pytest.skip("only root hands folders over")
    for name in range(25):
        (tmp_path / f"{name}\x1b").touch()
    with Folder.resolve(tmp_path) as top:
        if walk == "strip":
            strip_set_ids(top, monotonic=Clock())
        else:
            hand_over(top, USER, USER, Clock())
    assert said == [f"{STILL} {tmp_path}: {count} files so far" for count in (2, 12, 22)]


def test_a_short_walk_says_nothing(runs: Path, said: list[str]) -> None:
    with Folder.resolve(runs) as top:
        strip_set_ids(top)
    assert said == []
