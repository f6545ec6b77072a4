"""Datasets of ClearML: the real SDK and the real `clearml-data`, over a double of ClearML's server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from starling.cli.data import main as data_main
from starling.core.errors import DataError
from starling.data.dataset.dataset import DatasetDescription
from starling.data.fetch.find import CLEARML_FOLDER, check_folder, find_dataset
from starling.tracking.clearml.client.sdk import SdkError, run_sdk
from tests.doubles.clearml_server import Answer, ClearmlServerDouble

CLEARML_DATA = Path(sys.executable).with_name("clearml-data")


@pytest.fixture
def cells(tiny_data: Path, tmp_path: Path) -> Path:
    """Return a folder with a dataset, whose YAML says where it once lay, as guides have it."""
    folder = tmp_path / "cells"
    shutil.copytree(tiny_data.parent, folder)
    description = folder / "bccd.yaml"
    lines = [line for line in description.read_text().splitlines() if not line.startswith("path:")]
    description.write_text("\n".join(["path: ../datasets/cells", *lines]))
    return folder


def clearml_data(folder: Path, *words: str) -> str:
    """Run the SDK's own command as the guide has it, and return what it prints."""
    done = subprocess.run(
        [str(CLEARML_DATA), *words], cwd=folder, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_set_made_with_clearml_data_is_fetched_once_and_its_description_means_its_own_data(
    clearml_server: ClearmlServerDouble, cells: Path, runs: Path
) -> None:
    clearml_data(cells, "sync", "--project", "YOLOv5", "--name", "coco128", "--folder", ".")
    [identity] = clearml_server.records.tasks
    path = find_dataset(f"clearml://{identity}")
    description = DatasetDescription.from_yaml(path)
    assert description.root == runs / CLEARML_FOLDER / identity
    assert len(list((description.root / "images" / "train").iterdir())) == 8
    assert sorted(item.name for item in (runs / CLEARML_FOLDER).iterdir() if item.suffix != ".lock") == [
        identity
    ]
    clearml_server.stop()
    assert find_dataset(f"clearml://{identity}") == path


@pytest.mark.slow
def test_create_add_and_close_and_our_version_on_top_upload_what_is_new(
    clearml_server: ClearmlServerDouble, cells: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clearml_data(cells, "create", "--name", "cells", "--project", "YOLOv5")
    clearml_data(cells, "add", "--files", ".")
    clearml_data(cells, "close")
    [first] = clearml_server.records.tasks
    assert (
        data_main(["version", str(cells), "--project", "YOLOv5", "--name", "cells", "--parent", first]) == 3
    )
    assert "write `path: .`" in capsys.readouterr().err
    (cells / "bccd.yaml").write_text(
        (cells / "bccd.yaml").read_text().replace("path: ../datasets/cells", "path: .")
    )
    words = ["version", str(cells), "--project", "YOLOv5", "--name", "cells", "--parent", first, "--json"]
    assert data_main(words) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["added"], made["modified"], made["removed"]) == (0, 1, 0)
    assert clearml_server.records.tasks[made["id"]]["status"] == "completed"
    path = find_dataset(made["data"])
    assert "path: ." in path.read_text()
    assert len(list((path.parent / "labels" / "train").iterdir())) == 8


def test_what_is_wrong_with_a_set_is_said_and_leaves_nothing(
    clearml_server: ClearmlServerDouble, runs: Path
) -> None:
    create = clearml_server.records.answer
    training = create("tasks.create", {"name": "t", "type": "training"})["id"]
    unfinished = create("tasks.create", {"name": "d", "type": "data_processing", "system_tags": ["dataset"]})[
        "id"
    ]
    for identity, said in {
        "0" * 32: "has no dataset of this id",
        training: "is a task .*, not a dataset",
        unfinished: "clearml-data close --id",
        "../../etc": "not a dataset's id",
    }.items():
        with pytest.raises(DataError, match=said):
            find_dataset(f"clearml://{identity}")
    with pytest.raises(DataError, match=r"CLEARML_API_ACCESS_KEY.*or run clearml-init"):
        find_dataset(f"clearml://{training}", environment={"HOME": str(runs)})
    wrong = {**os.environ, "CLEARML_API_SECRET_KEY": "wrong"}
    with pytest.raises(DataError, match="refuses the credentials"):
        find_dataset(f"clearml://{training}", environment=wrong)
    assert [path for path in runs.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_a_folder_without_a_sound_description_makes_no_version(
    clearml_server: ClearmlServerDouble, cells: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    description = cells / "bccd.yaml"
    text = description.read_text().replace("path: ../datasets/cells", "path: .")
    for content, said in {
        "a: 1\n": "without train: and val:",
        text.replace("images/val", "/etc"): "is outside",
        text.replace("images/val", "images/nothing"): "is not there",
    }.items():
        description.write_text(content)
        assert data_main(["version", str(cells), "--name", "cells"]) == 3
        assert said in capsys.readouterr().err
    description.write_text(text)
    (cells / "other.yaml").write_text(text)
    with pytest.raises(DataError, match="several dataset YAMLs"):
        check_folder(cells)
    assert clearml_server.requests == []


@pytest.mark.slow
def test_an_sdk_that_hangs_is_killed(clearml_server: ClearmlServerDouble, tmp_path: Path) -> None:
    clearml_server.faults.answer = Answer(503)
    began = time.monotonic()
    with pytest.raises(SdkError, match="nothing moved for 4 s"):
        run_sdk("fetch", "0" * 32, str(tmp_path / "out"), folder=tmp_path / "work", idle_s=4)
    assert time.monotonic() - began < 30
