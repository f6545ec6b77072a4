"""Folders opened by descriptor: no link below the top is followed, whatever is swapped meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.core.folder import Folder, LinkRefused


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


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
    before = descriptors()
    with Folder.resolve(tmp_path / "runs") as runs:
        found = [str((folder.path / name).relative_to(tmp_path)) for folder, name, _ in runs.tree()]
        with pytest.raises(FileNotFoundError):
            runs.folder("a", "not there")
    assert found == ["runs/a", "runs/a/b", "runs/a/b/file", "runs/a/link"]
    assert descriptors() == before


def test_what_is_missing_is_named_by_its_whole_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with Folder.resolve(tmp_path) as folder:
        with pytest.raises(FileNotFoundError) as missing:
            folder.open("gone", os.O_RDONLY)
        with pytest.raises(NotADirectoryError) as no_folder:
            folder.folder("file")
    assert missing.value.filename == str(tmp_path / "gone")
    assert no_folder.value.filename == str(tmp_path / "file")
