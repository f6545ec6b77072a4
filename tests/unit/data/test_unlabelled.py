"""A split without any box: what is said of the labels that lie elsewhere, or in another form."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from starling.cli import train, val
from starling.cli.data import main as data_main
from starling.core.settings.train import TrainConfig
from starling.data.dataset.dataset import Dataset, DatasetDescription
from starling.data.dataset.unlabelled import explain_no_box
from starling.training.setup.data import load_data

ROW = "0 .5 .5 .2 .2\n"
VOC = (
    "<annotation><size><width>30</width><height>20</height></size><object><name>x</name>"
    "<bndbox><xmin>4</xmin><ymin>3</ymin><xmax>12</xmax><ymax>10</ymax></bndbox></object></annotation>"
)
LABELME = {
    "shapes": [
        {"label": "x", "shape_type": "rectangle", "points": [[3, 2], [12, 10]]},
        {"label": "x", "shape_type": "point", "points": [[3, 2]]},
    ],
    "imagePath": "p0.jpg",
    "imageHeight": 20,
    "imageWidth": 30,
}
COCO = {
    "images": [{"id": 1, "file_name": "p0.jpg", "width": 30, "height": 20}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [3, 2, 9, 8]}],
    "categories": [{"id": 1, "name": "x"}],
}


def _set(folder: Path, images: str = "images", stem: str = "p") -> Path:
    """Make two images in a folder, and return a description of them as both splits."""
    for number in range(2):
        path = folder / images / f"{stem}{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), (9, 9, 9)).save(path)
    yaml = folder / "data.yaml"
    yaml.write_text(f"path: .\ntrain: {images}\nval: {images}\nnames: [x]\n")
    return yaml


def _write(folder: Path, name: str, text: str = ROW) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _said(yaml: Path) -> str:
    description = DatasetDescription.from_yaml(yaml)
    data = Dataset.load(description, "train")
    assert not data.boxes
    return explain_no_box(description, "train", data)


def _boxes(yaml: Path) -> int:
    return Dataset.load(DatasetDescription.from_yaml(yaml), "train").boxes


def _command(said: str, start: str) -> str:
    """Return the shell command of a message from its first word on."""
    (line,) = [line for line in said.splitlines() if f" {start}" in line]
    return line[line.index(start) :]


@pytest.mark.parametrize(
    ("files", "start"),
    [
        (["labels/p0.TXT", "labels/p1.TXT"], "(cd"),
        (["label/p0.txt", "label/p1.txt"], "mv"),
        (["Labels/p0.txt", "Labels/p1.txt"], "mv"),
        (["obj_Train_data/p0.txt", "obj_Train_data/p1.txt", "obj.names"], "mv"),
        (["export/yolo/task-1/p0.txt", "export/yolo/task-1/p1.txt"], "mkdir"),
        (["valid/labels/p0.txt", "train/labels/p1.txt", "labels/other.txt"], "mkdir"),
    ],
)
def test_label_files_that_lie_or_end_otherwise_are_named_with_the_command_that_mends_it(
    tmp_path: Path, files: list[str], start: str
) -> None:
    yaml = _set(tmp_path)
    for name in files:
        _write(tmp_path, name)
    said = _said(yaml)
    assert f"looked for in {tmp_path}/labels (p0.txt for p0.jpg)" in said
    if start == "mkdir" and len(files) == 3:
        assert said.count("mkdir -p") == 2
        return
    subprocess.run(_command(said, start), shell=True, check=True)
    assert _boxes(yaml) == 2


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("my image ", "my%20image%20"),
        ("my%20image", "my image"),
        ("photo", "1a2b3c4d-photo"),
        ("1a2b3c4d-photo", "photo"),
        ("Photo", "photo"),
        ("photo", "photo0_jpg.rf.8e1d"),
    ],
)
def test_label_files_with_nearly_the_names_of_images_are_named(
    tmp_path: Path, image: str, label: str
) -> None:
    yaml = _set(tmp_path, stem=image)
    _write(tmp_path, f"labels/{label}0.txt")
    said = _said(yaml)
    assert f"1 label files have nearly the names of images: {label}0.txt for {image}0.jpg" in said
    subprocess.run(_command(said, "mv").removesuffix(", and so on"), shell=True, check=True)
    assert _boxes(yaml) == 1


def test_label_files_named_after_the_whole_name_of_their_image_are_named(tmp_path: Path) -> None:
    yaml = _set(tmp_path)
    _write(tmp_path, "labels/p0.jpg.txt")
    assert "p0.jpg.txt for p0.jpg" in _said(yaml)


@pytest.mark.parametrize(
    ("images", "file", "text"),
    [
        ("images", "labels/p0.xml", VOC),
        ("JPEGImages", "Annotations/p0.xml", VOC),
        ("images", "annotations/instances_train.json", json.dumps(COCO)),
        ("images", "images/p0.json", json.dumps(LABELME)),
        ("images", "p0.json", json.dumps(LABELME, indent=2)),
        ("images", "boxes.csv", 'image_id,width,height,bbox,source\np0,30,20,"[3, 2, 9, 8]",x\n'),
    ],
)
def test_the_command_that_is_named_converts_what_lies_there(
    tmp_path: Path, images: str, file: str, text: str
) -> None:
    yaml = _set(tmp_path, images)
    _write(tmp_path, file, text)
    words = shlex.split(_command(_said(yaml), "starling data convert"))
    assert data_main(words[2:]) == 0
    data = Dataset.load(DatasetDescription.from_yaml(yaml), "train")
    assert data.labels[0][0].tolist() == pytest.approx([0, 0.25, 0.3, 0.3, 0.4])
    assert data.boxes == 1


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        (
            "annotations.xml",
            "<?xml?><annotations><image id='0' name='p0.jpg'/></annotations>",
            "CVAT's own XML",
        ),
        (
            "export.json",
            '[{"id": 1, "annotations": [{"completed_by": 1}]}]',
            "a JSON format that is not read",
        ),
        ("train.csv", "filename,xmin,ymin,xmax,ymax\np0.jpg,1,2,3,4\n", "no converter reads it"),
        ("labels.zip", "PK", "unpack it"),
        ("readme.txt", "hello", "write {}/labels/p0.txt with a row"),
        ("package.json", '{"name": "x"}', "write {}/labels/p0.txt with a row"),
    ],
)
def test_what_no_converter_reads_is_named_with_what_to_do(
    tmp_path: Path, file: str, text: str, said: str
) -> None:
    yaml = _set(tmp_path)
    _write(tmp_path, file, text)
    assert said.format(tmp_path) in _said(yaml)


def test_label_files_that_are_all_empty_are_counted(tmp_path: Path) -> None:
    yaml = _set(tmp_path)
    _write(tmp_path, "labels/p0.txt", "")
    _write(tmp_path, "labels/p1.txt", "0 .5 .5 0 0\n")
    said = _said(yaml)
    assert "2 label files are there, and no row of theirs is a box" in said
    assert "p1.txt:1: a box of no size" in said


@pytest.mark.parametrize("more", [[], ["--evolve", "1"]])
def test_a_training_without_any_box_ends_with_3_before_its_first_epoch(
    tmp_path: Path, runs: Path, tiny_args: list[str], more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    yaml = _set(tmp_path)
    _write(tmp_path, "label/p0.txt")
    assert train.main([*tiny_args, "--data", str(yaml), "--epochs", "1", *more]) == 3
    printed = capsys.readouterr()
    assert "none of its 2 images has a box" in printed.err
    assert f"{tmp_path}/label: 1 files" in printed.err
    assert not list(runs.rglob("*.pt"))


def test_a_validation_split_without_any_box_is_a_warning_in_train_and_3_in_val(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], said: list[str]
) -> None:
    yaml = _set(tmp_path)
    _write(tmp_path, "images/p0.txt")
    Image.new("RGB", (30, 20)).save(tmp_path / "lone.jpg")
    yaml.write_text("path: .\ntrain: images\nval: lone.jpg\nnames: [x]\n")
    load_data(TrainConfig(data=str(yaml), cache="off"), 64, tmp_path / "cache")
    assert said[0].startswith(f"warning: {yaml}: val: none of its 1 images has a box")
    assert val.main(["--data", str(yaml), "--device", "cpu"]) == 3
    assert "val: none of its 1 images has a box" in capsys.readouterr().err
