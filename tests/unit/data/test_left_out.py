"""The account of what is passed over, and what a file is by its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from starling.cli import train, val
from starling.core.files.kinds import IMAGE_SUFFIXES, UNREAD_IMAGE_SUFFIXES, is_hidden, is_hidden_copy
from starling.data.dataset.left_out import LeftOut


def test_console_report_and_json_say_the_same_of_what_is_left_out() -> None:
    account = LeftOut()
    for name in ("a.avif", "b.HEIC", "c.avif"):
        account.add_unread_image(f"set/{name}")
    account.add("videos that end early", "film.mp4", "repair the file")
    assert len(account) == 4
    assert account.lines() == [
        "left out: images of a kind that is not read: 3 (.avif 2, .heic 1), first set/a.avif; "
        "convert them to JPEG or PNG",
        "left out: videos that end early: 1, first film.mp4; repair the file",
    ]
    assert [(row["reason"], row["count"], row["kinds"]) for row in account.as_list()] == [
        ("images of a kind that is not read", 3, {".avif": 2, ".heic": 1}),
        ("videos that end early", 1, {}),
    ]
    for finding, line in zip(account.findings(), account.lines(), strict=True):
        assert finding.remedy in line
        assert finding.problem.removesuffix(", this one first") in line


def test_accounts_add_up() -> None:
    one, other, whole = LeftOut(), LeftOut(), LeftOut()
    one.add_unread_image("a.jp2")
    other.add_unread_image("b.ppm")
    other.add("rows", "c.txt", "fix them", count=0)
    whole.update((one, other))
    assert [(row["count"], row["kinds"]) for row in whole.as_list()] == [(2, {".jp2": 1, ".ppm": 1})]


def test_no_image_is_of_a_kind_that_is_read_and_not_read() -> None:
    assert not IMAGE_SUFFIXES & UNREAD_IMAGE_SUFFIXES


@pytest.mark.parametrize(
    "name",
    ["._x.jpg", ".ipynb_checkpoints", ".DS_Store", "Thumbs.db", "@eaDir", "__MACOSX", "$RECYCLE.BIN", ".git"],
)
def test_what_systems_and_editors_leave_behind_is_no_data(name: str) -> None:
    assert is_hidden(name)


def test_a_listed_path_below_a_folder_with_a_dot_is_data_and_a_hidden_copy_is_not() -> None:
    assert not is_hidden_copy("/home/anna/.datasets/images/x.jpg")
    assert is_hidden_copy("/home/anna/.datasets/images/._x.jpg")
    assert is_hidden_copy("images/.ipynb_checkpoints/x-checkpoint.jpg")
    assert is_hidden_copy("__MACOSX\\images\\x.jpg")


def test_train_and_val_give_one_account_on_the_console_in_the_report_and_in_json(
    tmp_path: Path, tiny_args: list[str], tiny_data: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_data.parent, tmp_path / "data")
    data = str(tmp_path / "data" / tiny_data.name)
    for name in ("train/x.avif", "val/y.heic", "val/z.heic", "val/._y.heic"):
        (tmp_path / "data" / "images" / name).touch()
    (tmp_path / "data" / "images" / "val" / "broken.jpg").write_bytes(b"no image")
    line = "left out: images of a kind that is not read: 2 (.heic 2), first "
    flags = [*tiny_args, "--data", data, "--epochs", "1", "--noplots", "--json"]
    assert train.main(flags) == 0
    *lines, figures = capsys.readouterr().out.splitlines()
    accounts = json.loads(figures)["left_out"]
    assert [(row["count"], row["kinds"]) for row in accounts["train"]] == [(1, {".avif": 1})]
    assert {row["count"] for row in accounts["val"]} == {1, 2}
    assert [text.strip()[: len(line)] for text in lines].count(line) == 1
    assert "1 images left out" in "\n".join(lines)
    assert "(.heic 2), this one first" in (runs / "train" / "exp" / "labels_report.csv").read_text()
    weights = str(runs / "train" / "exp" / "weights" / "best.pt")
    assert val.main(["--weights", weights, "--data", data, "--img", "64", "--device", "cpu", "--json"]) == 0
    *lines, figures = capsys.readouterr().out.splitlines()
    assert json.loads(figures)["left_out"] == accounts["val"]
    assert [text.strip()[: len(line)] for text in lines].count(line) == 1
