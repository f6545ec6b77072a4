"""Label formats of public datasets become rows that the trainer reads, and nothing that was there is changed."""

from __future__ import annotations

import json
import shutil
import time
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest

from starling.cli import data as data_command
from starling.core.errors import DataError
from starling.data.dataset.dataset import Dataset, DatasetDescription
from starling.data.dataset.labels import read_labels
from starling.data.fetch.convert import (
    Converted,
    convert_coco,
    convert_open_images,
    convert_visdrone,
    convert_voc,
    convert_wheat,
)

WIDTH, HEIGHT = 200, 100


def image(path: Path) -> Path:
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
    """A Pascal VOC folder of one image: a cat over its left half, a difficult dog, a dog partly outside."""
    folder = tmp_path / "VOCdevkit" / "VOC2007"
    image(folder / "JPEGImages" / "000001.jpg")
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
    image(tmp_path / "set/images/a.jpg")
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
            image(folder / "images" / name)
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


BOXES = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction"


def box_row(image: str, label: str, edges: str, group: int = 0) -> str:
    """A row of the CSV; `edges` are XMin,XMax,YMin,YMax."""
    return f"{image},xclick,{label},1,{edges},0,-1,{group},0"


@pytest.fixture
def open_images(tmp_path: Path) -> Path:
    """Two images, a class file and a CSV: rows of `a` in two places, a group, and an image that is not there."""
    for name in ("a", "b"):
        image(tmp_path / "images/train" / f"{name}.jpg")
    (tmp_path / "classes.csv").write_text('/m/01,Cat\n/m/02,"Dog, big"\n')
    lines = [
        BOXES,
        box_row("a", "/m/02", "0,0.5,0,0.25"),
        box_row("a", "/m/01", "0,1,0,1", group=1),
        box_row("gone", "/m/01", "0,1,0,1"),
        box_row("b", "/m/01", "0.2,0.2,0,1"),
        box_row("a", "/m/01", "0.5,1.001,0.5,1"),
        box_row("a", "/m/02", "0,0.5,0,0.25"),
        box_row("gone", "/m/02", "0,1,0,1"),
    ]
    (tmp_path / "boxes.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def convert_open(root: Path, images: str = "images/train") -> Converted:
    names = ["Cat", "Dog, big"]
    return convert_open_images(root, names, source="boxes.csv", images=images, classes="classes.csv")


def test_open_images_rows_of_one_image_are_gathered_wherever_they_stand(open_images: Path) -> None:
    assert convert_open(open_images) == Converted(2, "2 rows of images that are not in images/train")
    assert rows(open_images / "labels/train/a.txt") == [
        [1, 0.25, 0.125, 0.5, 0.25],
        [0, 0.75, 0.75, 0.5, 0.5],
    ]
    assert rows(open_images / "labels/train/b.txt") == []
    assert sorted(path.name for path in (open_images / "labels").rglob("*")) == ["a.txt", "b.txt", "train"]


def test_open_images_rows_that_alternate_between_two_images_take_time_with_their_number_alone(
    open_images: Path,
) -> None:
    pairs = 6_000
    lines = (box_row("ab"[n % 2], "/m/01", f"0,{(n + 1) / pairs / 2:.6f},0,1") for n in range(2 * pairs))
    (open_images / "boxes.csv").write_text("\n".join((BOXES, *lines, "")))
    began = time.process_time()
    assert convert_open(open_images).images == 2
    assert time.process_time() - began < 8
    assert len(rows(open_images / "labels/train/a.txt")) == pairs


def test_open_images_split_without_its_folder_is_passed_over_and_one_without_its_images_is_refused(
    open_images: Path,
) -> None:
    assert convert_open(open_images, "images/test") == Converted(
        0, "images/test is not there, so boxes.csv is not read"
    )
    image(open_images / "images/test/other.jpg")
    with pytest.raises(DataError, match=r"no image of boxes\.csv is there"):
        convert_open(open_images, "images/test")
    assert not (open_images / "labels").exists() or not list((open_images / "labels").iterdir())


def test_open_images_labels_that_are_there_are_never_replaced(open_images: Path) -> None:
    (open_images / "labels/train").mkdir(parents=True)
    (open_images / "labels/train/a.txt").write_text("mine")
    with pytest.raises(DataError, match="never replaced"):
        convert_open(open_images)
    assert (open_images / "labels/train/a.txt").read_text() == "mine"
    assert [path.name for path in (open_images / "labels").iterdir()] == ["train"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (box_row("a", "/m/09", "0,1,0,1"), "'/m/09' is not among the class descriptions"),
        (box_row("../a", "/m/01", "0,1,0,1"), "no ImageID"),
        (box_row("a", "/m/01", "0,100,0,50"), "corners from 0 to 1"),
        (box_row("a", "/m/01", "0.9,0.1,0,1"), "corners from 0 to 1"),
        (box_row("a", "/m/01", "0,nan,0,1"), "not finite"),
        (box_row("a", "/m/01", "0,x,0,1"), "could not convert"),
        (box_row("a", "/m/01", "0,1,0,1", group=7), "IsGroupOf is '7'"),
        ("gone,xclick,/m/01,1,0,1", "6 columns, the heading has 12"),
    ],
)
def test_open_images_row_that_cannot_be_true_is_named_with_its_line_and_leaves_no_labels(
    open_images: Path, row: str, reason: str
) -> None:
    with open(open_images / "boxes.csv", "a") as file:
        file.write(f"{row}\n")
    with pytest.raises(DataError, match=r"boxes\.csv:9: ") as error:
        convert_open(open_images)
    assert reason in str(error.value)
    assert list((open_images / "labels").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (
            "boxes.csv",
            "ImageID,LabelName\na,/m/01\n",
            "boxes.csv:1: no column XMin, YMin, XMax, YMax, IsGroupOf",
        ),
        ("boxes.csv", "", "boxes.csv:1: no column"),
        ("classes.csv", "/m/01,Cat\nDog\n", "classes.csv:2: not a class description"),
        ("classes.csv", "/m/01,Cat\n/m/01,Dog\n", "classes.csv:2: not a class description"),
        ("classes.csv", '/m/02,"Dog, big"\n/m/01,Cat\n', "make them agree"),
        ("classes.csv", "", "describes no classes"),
    ],
)
def test_files_that_are_not_those_of_open_images_are_refused(
    open_images: Path, name: str, content: str, reason: str
) -> None:
    (open_images / name).write_text(content)
    with pytest.raises(DataError) as error:
        convert_open(open_images)
    assert reason in str(error.value)


def test_open_images_are_read_one_by_one_in_memory_that_does_not_grow(open_images: Path) -> None:
    def peak(count: int) -> int:
        with open(open_images / "boxes.csv", "w") as file:
            file.write(f"{BOXES}\n{box_row('a', '/m/01', '0,1,0,1')}\n")
            file.writelines(f"{box_row(f'{n // 4:x}0', '/m/01', '0,1,0,1')}\n" for n in range(count))
        tracemalloc.start()
        assert convert_open(open_images) == Converted(
            1, f"{count} rows of images that are not in images/train"
        )
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        shutil.rmtree(open_images / "labels")
        return highest

    peak(100)  # imports
    assert peak(20_000) < peak(1000) + 200_000  # the names of 5000 images alone are twice that


def test_convert_command_writes_the_names_of_the_class_file_beside_the_data(open_images: Path) -> None:
    description = (
        "path: x\ntrain: images/train\nnc: 2\ndownload:\n  - {names: classes.csv}\n"
        "  - {convert: openimages, source: boxes.csv, images: images/train, classes: classes.csv}\n"
    )
    given = open_images / "given" / "my.yaml"
    given.parent.mkdir()
    given.write_text(description)
    assert data_command.main(["convert", str(given), str(open_images)]) == 0
    loaded = DatasetDescription.from_yaml(open_images / "my.yaml")
    assert loaded.names == ("Cat", "Dog, big")
    assert [len(rows) for rows in Dataset.load(loaded, "train", strict=True).labels] == [2, 0]
    assert given.read_text() == description


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
