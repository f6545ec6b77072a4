"""Text that Windows wrote as UTF-16 is named as that by every reader, with the command that rewrites it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from launcher.options.config_file import read_mapping
from launcher.options.request import read_env_file
from launcher.options.training_files import read_dataset
from starling.config.yaml_reader import read_yaml
from starling.core.errors import DataError, UsageError
from starling.core.errors import DataError as LauncherDataError
from starling.core.errors import UsageError as LauncherUsageError
from starling.core.plain_json import NotJson, parse_json
from starling.core.settings.study_url import parse_study_url
from starling.core.utf8 import NotUtf8, check_utf8, text_of
from starling.data.dataset.image_lists import find_images
from starling.data.dataset.labels import read_labels
from starling.data.fetch import convert
from starling.data.fetch.convert import read_bounded, read_open_images_classes, read_voc
from starling.data.sources.sources import find_sources
from starling.plots.results import read_results
from starling.search.importing import read_evolve_csv
from starling.search.storage.database import find_password
from starling.tracking.mlflow.client import read_password
from starling.tracking.tracker import TrackerUnavailableError


def labels(path: Path) -> None:
    problems = read_labels(path, 1).problems
    if problems:
        raise DataError("\n".join(map(str, problems)))


READERS: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "description.yaml": (read_yaml, "path: data\nnames: [person, käfer]\n"),
    "starling.yaml": (read_mapping, "memory: 1g\nworkers: 8\n"),
    "dataset.yaml": (read_dataset, "train: images\nval: images\n"),
    "labels.txt": (labels, "0 0.5 0.5 0.1 0.1\n"),
    "train.txt": (lambda path: find_images([path], path.parent, "train"), "./images/1.jpg\n"),
    "sources.txt": (lambda path: find_sources(str(path)), "images/1.jpg\n"),
    "evolve.csv": (read_evolve_csv, "metrics/precision,lr0\n1,2\n"),
    "results.csv": (read_results, "epoch,loss\n1,2\n"),
    "variables.env": (lambda path: read_env_file(path, {}), "NAME=value\n"),
    "voc.xml": (lambda path: read_voc(path, ["x"]), "<annotation></annotation>\n"),
    "boxes.csv": (lambda path: list(convert._csv_lines(path)), "ImageID,LabelName\n"),
    "classes.csv": (read_open_images_classes, "/m/0k4j,Car\n"),
    "coco.json": (
        lambda path: convert.convert_coco(path.parent, ["x"], source=path.name, images="images"),
        '{"categories": [], "images": [], "annotations": []}\n',
    ),
    "lines.txt": (lambda path: read_bounded(path, 1000), "000001\n000002\n"),
}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", READERS)
def test_every_reader_names_the_encoding_and_its_command_rewrites_the_file(
    tmp_path: Path, name: str, encoding: str
) -> None:
    read, text = READERS[name]
    folder = tmp_path / "it's here"
    (folder / "images").mkdir(parents=True)
    (folder / "images/1.jpg").touch()
    path = folder / name
    path.write_bytes(text.encode(encoding))
    with pytest.raises((DataError, UsageError, LauncherUsageError, LauncherDataError)) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert f"{encoding[:6].upper()}" in message
    assert len(message.splitlines()) == 1
    command = message.partition("rewrite it: ")[2].partition(" (in PowerShell")[0]
    assert command.startswith("iconv -f UTF-")
    subprocess.run(["sh", "-c", command], check=True, capture_output=True)
    assert text_of(path.read_bytes(), path) == text
    said = ""
    try:
        read(path)
    except (DataError, UsageError, LauncherUsageError, LauncherDataError) as error:  # of what the text says
        said = str(error)
    assert "UTF-" not in said


def test_a_password_that_windows_wrote_is_read_or_named_and_never_shown(tmp_path: Path) -> None:
    path = tmp_path / "password"
    url = parse_study_url("postgresql://u@host/db")
    environment = {"STARLING_STUDY_PASSWORD_FILE": str(path), "MLFLOW_TRACKING_PASSWORD_FILE": str(path)}
    client: dict[str, str] = {}
    path.write_bytes("hunter2\r\n".encode("utf-8-sig"))
    assert find_password(url, environment) == "hunter2"
    read_password(environment, client)
    assert client == {"MLFLOW_TRACKING_PASSWORD": "hunter2"}
    path.write_bytes("hunter2\r\n".encode("utf-16"))
    with pytest.raises(UsageError, match="UTF-16 text, not UTF-8"):
        find_password(url, environment)
    with pytest.raises(TrackerUnavailableError, match="UTF-16 text, not UTF-8"):
        read_password(environment, client)


def test_json_in_utf_16_is_named() -> None:
    with pytest.raises(NotJson, match="no JSON: UTF-16 text, not UTF-8"):
        parse_json("[1]".encode("utf-16"))


def test_text_and_bytes_that_are_no_text_are_not_taken_for_utf_16() -> None:
    for content in (
        b"",
        b"0",
        b"\0" * 600,
        b"a\0b",
        bytes(range(256)),
        "käfer 猫 0 1 2 3".encode(),
        b"\xef\xbb\xbfa: 1\n",
    ):
        check_utf8(content, "x")
    assert text_of(b"\xef\xbb\xbfa", "x") == "a"
    with pytest.raises(NotUtf8, match="not UTF-8 text; save it as UTF-8"):
        text_of(b"k\xe4fer", "x")
