"""Label formats of public datasets become rows that the trainer reads, and nothing that was there is changed."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from app.data import __main__ as data_command
from app.data.convert import convert_coco, convert_visdrone, convert_voc, convert_wheat
from app.data.dataset import Dataset, DatasetDescription
from app.data.labels import read_labels
from app.errors import DataError

WIDTH, HEIGHT = 200, 100


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((HEIGHT, WIDTH, 3), 127, np.uint8))
    return path


def rows(path: Path, nc: int = 100) -> list[list[float]]:
    label_file = read_labels(path, nc)
    assert not label_file.problems
    return [[round(float(value), 4) for value in row] for row in label_file.rows]


def voc_object(name: str, box: tuple[float, ...], difficult: int = 0) -> str:
    edges = "".join(
        f"<{edge}>{v}</{edge}>" for edge, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{edges}</bndbox></object>"


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """A Pascal VOC folder of one picture: a cat over its left half, a difficult dog, a dog partly outside."""
    folder = tmp_path / "VOCdevkit" / "VOC2007"
    picture(folder / "JPEGImages" / "000001.jpg")
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "train.txt").write_text("000001\n")
    (folder / "Annotations").mkdir()
    objects = (
        voc_object("cat", (1, 1, 100, 100)),
        voc_object("dog", (1, 1, 50, 50), 1),
        voc_object("dog", (151, 51, 230, 120)),
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
    (folder / "Annotations" / "000001.xml").write_text(f"<annotation>{size}{''.join(objects)}</annotation>")
    return tmp_path


def convert_train(root: Path, names: tuple[str, ...] = ("cat", "dog")) -> int:
    return convert_voc(root, names, source="VOCdevkit/VOC2007", split="train", into="train2007")


def test_voc_corners_count_from_one_and_difficult_objects_are_left_out(voc: Path) -> None:
    assert convert_train(voc) == 1
    assert rows(voc / "labels/train2007/000001.txt") == [
        [0, 0.25, 0.5, 0.5, 1.0],
        [1, 0.875, 0.75, 0.25, 0.5],
    ]
    assert (voc / "images/train2007/000001.jpg").samefile(voc / "VOCdevkit/VOC2007/JPEGImages/000001.jpg")


def test_voc_class_that_the_description_lacks_is_named(voc: Path) -> None:
    with pytest.raises(DataError, match=r"class 'dog' is not in the description \(did you mean 'dogs'\?\)"):
        convert_train(voc, ("cat", "dogs"))


def test_labels_that_are_there_are_never_replaced(voc: Path) -> None:
    convert_train(voc)
    (voc / "images/train2007/000001.jpg").unlink()
    with pytest.raises(DataError, match="never replaced"):
        convert_train(voc)


def test_xml_that_declares_entities_or_is_cut_off_is_refused(voc: Path) -> None:
    annotation = voc / "VOCdevkit/VOC2007/Annotations/000001.xml"
    content = annotation.read_text()
    annotation.write_text(f'<!DOCTYPE a [<!ENTITY b "{"x" * 50}">]>{content}')
    with pytest.raises(DataError, match="entities"):
        convert_train(voc)
    annotation.write_text(content[:-30])
    with pytest.raises(DataError, match="not a VOC annotation"):
        convert_train(voc)


def test_list_of_a_dataset_cannot_name_files_outside(voc: Path) -> None:
    (voc / "VOCdevkit/VOC2007/ImageSets/Main/train.txt").write_text("../../../secret\n")
    with pytest.raises(DataError, match="leads out"):
        convert_train(voc)


@pytest.fixture
def visdrone(tmp_path: Path) -> Path:
    picture(tmp_path / "set/images/a.jpg")
    (tmp_path / "set/annotations").mkdir()
    lines = [
        "0,0,100,50,1,4,0,0",
        "0,0,20,20,0,1,0,0",
        "5,5,20,20,1,0,0,0",
        "9,9,9,9,1,11,0,0",
        "180,90,40,40,1,10,1,2,",
    ]
    (tmp_path / "set/annotations/a.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_visdrone_leaves_ignored_regions_and_others_out_and_counts_classes_from_zero(visdrone: Path) -> None:
    names = [f"class{number}" for number in range(10)]
    assert convert_visdrone(visdrone, names, source="set") == 1
    assert rows(visdrone / "set/labels/a.txt") == [[3, 0.25, 0.25, 0.5, 0.5], [9, 0.95, 0.95, 0.1, 0.1]]


def test_visdrone_row_that_is_none_is_named_with_its_line(visdrone: Path) -> None:
    (visdrone / "set/annotations/a.txt").write_text("0,0,100,50,1,4,0,0\nhello\n")
    with pytest.raises(DataError, match=r"a\.txt:2"):
        convert_visdrone(visdrone, ["a"], source="set")


def test_both_layouts_of_the_wheat_csv_give_the_same_rows(tmp_path: Path) -> None:
    for root, content in (
        ("2021", "image_name,BoxesString,domain\na.png,0 0 100 50;100 50 200 100,X\nb.png,no_box,X\n"),
        (
            "2020",
            'image_id,width,height,bbox,source\na,200,100,"[0.0, 0.0, 100.0, 50.0]",x\na,200,100,"[100, 50, 100, 50]",x\n',
        ),
    ):
        folder = tmp_path / root
        for name in ("a.png", "b.png", "a.jpg"):
            picture(folder / "images" / name)
        (folder / "train.csv").write_text(content)
        convert_wheat(folder, ["wheat_head"], source="train.csv", images="images")
        assert rows(folder / "labels/a.txt") == [[0, 0.25, 0.25, 0.5, 0.5], [0, 0.75, 0.75, 0.5, 0.5]]
    assert rows(tmp_path / "2021/labels/b.txt") == []


@pytest.mark.parametrize(
    "content",
    [
        "image_name,BoxesString\na.png,1 2 3\n",
        "image_id,bbox\na,__import__('os')\n",
        "image_name,BoxesString\n../../a.png,1 2 3 4\n",
        "other\n1\n",
    ],
)
def test_wheat_csv_with_wrong_rows_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "train.csv").write_text(content)
    with pytest.raises(DataError):
        convert_wheat(tmp_path, ["wheat_head"], source="train.csv", images="images")


def coco_content() -> dict[str, object]:
    return {
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "images": [
            {"id": 1, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT},
            {"id": 2, "file_name": "b.jpg", "width": WIDTH, "height": HEIGHT},
        ],
        "annotations": [
            {"image_id": 1, "category_id": 7, "bbox": [0, 0, 100, 50], "iscrowd": 0},
            {"image_id": 1, "category_id": 3, "bbox": [0, 0, 200, 100], "iscrowd": 1},
            {"image_id": 1, "category_id": 3, "bbox": [50, 50, 0, 10], "iscrowd": 0},
        ],
    }


def test_coco_categories_become_classes_by_their_ids_and_crowds_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(coco_content()))
    assert convert_coco(tmp_path, ["cat", "dog"], source="a.json", images="images/train") == 2
    assert rows(tmp_path / "labels/train/a.txt") == [[1, 0.25, 0.25, 0.5, 0.5]]
    assert rows(tmp_path / "labels/train/b.txt") == []


@pytest.mark.parametrize("names", [["dog", "cat"], ["cat"], ["cat", "dog", "cow"]])
def test_coco_categories_other_than_the_description_are_refused(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "a.json").write_text(json.dumps(coco_content()))
    with pytest.raises(DataError, match="make them agree"):
        convert_coco(tmp_path, names, source="a.json", images="images/train")
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"categories": [], "annotations": []}'])
def test_json_that_is_no_coco_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError):
        convert_coco(tmp_path, [], source="a.json", images="images")


def test_convert_command_makes_a_dataset_that_is_there_ready_to_train_on(
    voc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (voc / "my.yaml").write_text(
        "path: .\ntrain: images/train2007\nnames: [cat, dog]\ndownload:\n"
        "  - {convert: voc, source: VOCdevkit/VOC2007, split: train, into: train2007}\n"
    )
    assert data_command.main(["convert", str(voc / "my.yaml"), str(voc)]) == 0
    dataset = Dataset.load(DatasetDescription.from_yaml(voc / "my.yaml"), "train", strict=True)
    assert dataset.labels[0][:, 0].tolist() == [0, 1]
    assert data_command.main(["convert", "coco128.yaml", str(voc)]) == 3
