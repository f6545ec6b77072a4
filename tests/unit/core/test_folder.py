"""Folders opened by descriptor: no link below the top is followed, whatever is swapped meanwhile."""

from __future__ import annotations

import contextlib
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from starling.core.files.folder import Folder, LinkRefused
from starling.core.files.safe_open import remove_tree


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def open_below(top: Path) -> list[str]:
    """Return what this process holds open at or below ``top``.

    A count of all descriptors would also count files of other tests, which the garbage collector closes
    whenever it runs.
    """
    held = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own descriptor
            held.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return [path for path in held if path == str(top) or path.startswith(f"{top}/")]


def test_a_link_at_the_top_is_followed_and_below_it_is_refused(tmp_path: Path) -> None:
    elsewhere = tmp_path / "big disk"
    (elsewhere / "project").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(elsewhere)
    (elsewhere / "out").symlink_to(tmp_path)
    with Folder.resolve(tmp_path / "runs") as runs:
        runs.folder("project", "new", create=True).close()
        with pytest.raises(LinkRefused, match="out"):
            runs.folder("out")
        with pytest.raises(LinkRefused):
            runs.folder("out", "made", create=True)
        with pytest.raises(LinkRefused):
            runs.open("out", os.O_RDONLY)
    assert (elsewhere / "project/new").is_dir()
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("link", ["runs", "disk"])
def test_a_link_to_nothing_at_the_top_is_named_and_what_it_names_is_not_made(
    tmp_path: Path, link: str
) -> None:
    (tmp_path / link).symlink_to(tmp_path / "not mounted")
    with pytest.raises(
        FileNotFoundError, match=r"is a symbolic link to .*not mounted, which does not exist"
    ) as error:
        Folder.resolve(tmp_path / {"runs": "runs", "disk": "disk/runs"}[link], create=True)
    assert error.value.filename == str(tmp_path / link)
    assert not (tmp_path / "not mounted").exists()


def test_a_folder_stays_itself_when_its_path_is_swapped_for_a_link(tmp_path: Path) -> None:
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "victim").mkdir()
    with Folder.resolve(tmp_path / "runs") as runs, runs.folder("a") as below:
        (tmp_path / "runs/a").rename(tmp_path / "runs/moved")
        (tmp_path / "runs/a").symlink_to(tmp_path / "victim")
        os.close(below.open("file", os.O_WRONLY | os.O_CREAT))
    assert (tmp_path / "runs/moved/file").exists()
    assert list((tmp_path / "victim").iterdir()) == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", "a\0"])
def test_only_single_components_are_names(tmp_path: Path, name: str) -> None:
    with Folder.resolve(tmp_path) as folder, pytest.raises(ValueError, match="not one path component"):
        folder.open(name, os.O_RDONLY)


def test_a_tree_is_walked_without_entering_links_and_no_descriptor_is_left(tmp_path: Path) -> None:
    (tmp_path / "runs/a/b").mkdir(parents=True)
    (tmp_path / "runs/a/b/file").touch()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key").touch()
    (tmp_path / "runs/a/link").symlink_to(tmp_path / "secret")
    with Folder.resolve(tmp_path / "runs") as runs:
        found = [str((folder.path / name).relative_to(tmp_path)) for folder, name, _ in runs.tree()]
        with pytest.raises(FileNotFoundError):
            runs.folder("a", "not there")
    assert sorted(found) == ["runs/a", "runs/a/b", "runs/a/b/file", "runs/a/link"]
    assert found.index("runs/a") < found.index("runs/a/b") < found.index("runs/a/b/file")
    assert open_below(tmp_path) == []


def test_what_is_missing_is_named_by_its_whole_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with Folder.resolve(tmp_path) as folder:
        with pytest.raises(FileNotFoundError) as missing:
            folder.open("gone", os.O_RDONLY)
        with pytest.raises(NotADirectoryError) as no_folder:
            folder.folder("file")
    assert missing.value.filename == str(tmp_path / "gone")
    assert no_folder.value.filename == str(tmp_path / "file")


DEEP = 1500
"""Levels: more than Python's recursion, a path's letters or a process's descriptors would allow."""


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """A tree of DEEP levels with a file at its end, for a process of few descriptors."""
    (tmp_path / "deep").mkdir()
    at = os.open(tmp_path / "deep", os.O_RDONLY)
    for _ in range(DEEP):
        os.mkdir("a folder", dir_fd=at)
        below = os.open("a folder", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=at))
    os.close(at)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() + 24, limits[1]))
    yield tmp_path / "deep"
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    if (tmp_path / "deep").exists():
        with Folder.resolve(tmp_path / "deep") as folder:
            folder.empty()


@pytest.mark.parametrize("folders_last", [False, True])
def test_a_tree_of_any_depth_is_walked_with_a_few_descriptors(deep: Path, folders_last: bool) -> None:
    with Folder.resolve(deep) as folder:
        found = [name for _, name, _ in folder.tree(folders_last=folders_last)]
    assert found.count("a folder") == DEEP
    assert found.index("file") == (0 if folders_last else DEEP)
    assert open_below(deep) == []


def test_a_tree_of_any_depth_is_emptied_with_a_few_descriptors(deep: Path) -> None:
    with Folder.resolve(deep) as folder:
        folder.empty()
    assert list(deep.iterdir()) == []


def test_a_walk_goes_on_at_the_top_when_the_tree_is_moved_away_under_it_and_never_outside(
    tmp_path: Path,
) -> None:
    for name in ("runs/a/b/c", "runs/z", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "elsewhere/secret").touch()
    found = []
    with Folder.resolve(tmp_path / "runs") as runs:
        for _, name, _ in runs.tree():
            found.append(name)
            if name == "c":
                (tmp_path / "runs/a/b").rename(tmp_path / "elsewhere/b")
    assert sorted(found) == ["a", "b", "c", "z"]


def test_emptying_removes_links_and_never_what_they_lead_to(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/file").touch()
    (tmp_path / "run/a/b").mkdir(parents=True)
    for place in ("run/link", "run/a/link", "run/a/b/link"):
        (tmp_path / place).symlink_to(tmp_path / "victim")
    os.mkfifo(tmp_path / "run/a/pipe")
    with Folder.resolve(tmp_path / "run") as folder:
        folder.empty()
    assert list((tmp_path / "run").iterdir()) == []
    assert (tmp_path / "victim/file").exists()


def test_what_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run/a").mkdir(parents=True)
    (tmp_path / "run/a/file").touch()
    unlink = os.unlink

    def refuse(path: str, *, dir_fd: int | None = None) -> None:
        if path == "file":
            raise PermissionError(1, "Operation not permitted", path)
        unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr("os.unlink", refuse)
    with Folder.resolve(tmp_path / "run") as folder, pytest.raises(PermissionError) as refused:
        folder.empty()
    assert refused.value.filename == str(tmp_path / "run/a/file")


def test_a_top_that_is_made_is_its_users_alone_and_one_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(Folder.resolve(tmp_path / "new/runs", create=True))
        (tmp_path / "old").mkdir(mode=0o755)
        stack.enter_context(Folder.resolve(tmp_path / "old", create=True))
    assert stat.S_IMODE((tmp_path / "new/runs").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == 0o755


def test_a_tree_of_any_depth_is_removed_whole(deep: Path) -> None:
    remove_tree(deep)
    assert not deep.exists()


def test_what_cannot_be_removed_stays_alone_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("run/a/shut/file", "run/b/file", "run/z"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "run/a/shut").chmod(0o500)
    if os.geteuid() == 0:  # whom no mode stops
        as_nobody(tmp_path, "run")
    else:
        remove_tree(tmp_path / "run")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "run",
        "run/a",
        "run/a/shut",
        "run/a/shut/file",
    ]
    (tmp_path / "run/a/shut").chmod(0o700)


def as_nobody(folder: Path, name: str) -> None:
    """Remove a tree of `folder` in a process of an ordinary user's."""
    for place in (folder, *folder.rglob("*")):
        os.lchown(place, 12345, 12345)
    at = os.open(folder, os.O_RDONLY)
    child = os.fork()
    if child == 0:
        os.fchdir(at)  # the folders above are root's alone
        os.setgroups([])
        os.setgid(12345)
        os.setuid(12345)
        remove_tree(Path(f"/proc/self/fd/{at}/{name}"))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    os.close(at)


def test_what_is_not_there_or_is_no_folder_is_left_alone(tmp_path: Path) -> None:
    remove_tree(tmp_path / "gone")
    remove_tree(tmp_path / "gone/deeper")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        remove_tree(tmp_path / name)
        assert os.path.lexists(tmp_path / name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
@pytest.mark.parametrize("mounted", ["run/data", "run"])
def test_what_is_mounted_below_is_never_emptied(tmp_path: Path, mounted: str) -> None:
    (tmp_path / "dataset/images").mkdir(parents=True)
    (tmp_path / "dataset/images/1.jpg").touch()
    (tmp_path / "run/data").mkdir(parents=True)
    (tmp_path / "run/file").touch()
    script = (
        f"mount --bind {tmp_path}/dataset {tmp_path}/{mounted} && {sys.executable} -c "
        f"'from starling.core.files.safe_open import remove_tree; from pathlib import Path; remove_tree(Path(\"{tmp_path}/run\"))'"
    )
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dataset/images/1.jpg").exists()
    assert (tmp_path / "run/file").exists() == (mounted == "run")
