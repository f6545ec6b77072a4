"""Dataset descriptions and the pairs found through them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.data.dataset import Dataset, DatasetDescription
from app.data.findings import write_report
from app.errors import DataError, UsageError


def _picture(path: Path, hw: tuple[int, int] = (20, 30), labels: str | None = "0 .5 .5 .2 .2\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", hw[::-1], (10, 20, 30)).save(path)
    if labels is not None:
        folder = Path(*("labels" if part == "images" else part for part in path.parent.parts))
        label = folder / f"{path.stem}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(labels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset of three training pictures and one for validation."""
    for name in "cab":
        _picture(tmp_path / "images" / "train" / f"{name}.png", labels=f"{'abc'.index(name)} .5 .5 .2 .2\n")
    _picture(tmp_path / "images" / "val" / "v.png", labels=None)
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnc: 3\nnames: [x, y, z]\n")
    return tmp_path


def _describe(folder: Path, text: str) -> DatasetDescription:
    (folder / "data.yaml").write_text(text)
    return DatasetDescription.from_yaml(folder / "data.yaml")


def test_pairs_come_sorted_with_labels_and_shapes(folder: Path) -> None:
    dataset = Dataset.load(DatasetDescription.from_yaml(folder / "data.yaml"), "train")
    assert [path.name for path in dataset.images] == ["a.png", "b.png", "c.png"]
    assert [rows[0, 0] for rows in dataset.labels] == [0, 1, 2]
    assert dataset.shapes_hw.tolist() == [[20, 30]] * 3
    assert (dataset.names, dataset.nc, len(dataset)) == (("x", "y", "z"), 3, 3)


def test_a_picture_without_labels_is_background(folder: Path) -> None:
    dataset = Dataset.load(DatasetDescription.from_yaml(folder / "data.yaml"), "val")
    assert dataset.labels[0].shape == (0, 5)


def test_a_changed_kpt_shape_changes_the_rows_and_the_digest(folder: Path) -> None:
    row = "0 .3 .4 .1 .12 .27 .36 .33 .36 .3 .4 .27 .44 .33 .44\n"
    for path in (folder / "labels" / "train").iterdir():
        path.write_text(row)
    text = "train: images/train\nnames: [x]\n"
    polygons = Dataset.load(_describe(folder, text), "train")
    boxes = Dataset.load(_describe(folder, f"{text}kpt_shape: [5, 2]\nflip_idx: [1, 0, 2, 4, 3]\n"), "train")
    assert np.allclose(boxes.labels[0], [[0, 0.3, 0.4, 0.1, 0.12]])
    assert polygons.polygons
    assert not boxes.polygons
    assert boxes.digest != polygons.digest
    assert "all 3 label rows have 15 columns" in str(polygons.notes[0])
    assert "kpt_shape: [5, 2]" in polygons.notes[0].remedy
    assert not boxes.notes


def test_single_cls_counts_every_class_as_one(folder: Path) -> None:
    description = DatasetDescription.from_yaml(folder / "data.yaml", single_cls=True)
    dataset = Dataset.load(description, "train")
    assert description.names == ("item",)
    assert {float(rows[0, 0]) for rows in dataset.labels} == {0.0}


def test_splits_may_be_a_folder_a_list_of_folders_or_a_text_list(folder: Path) -> None:
    (folder / "some.txt").write_text("./images/train/a.png\nimages/train/b.png\n\n")
    description = _describe(
        folder, "train: [images/train, images/val]\nval: some.txt\nnames: {0: x, 1: y, 2: z}\n"
    )
    assert len(Dataset.load(description, "train")) == 4
    assert [path.name for path in Dataset.load(description, "val").images] == ["a.png", "b.png"]


@pytest.mark.parametrize("place", ["beside the yaml", "working folder", "../datasets"])
def test_a_relative_path_is_looked_for_in_the_three_places(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    work = elsewhere / "work"
    parents = {"beside the yaml": folder, "working folder": work, "../datasets": elsewhere / "datasets"}
    for parent in (work, parents[place]):
        parent.mkdir(exist_ok=True)
    monkeypatch.chdir(work)
    (folder / "images").rename(folder / "moved")
    (parents[place] / "mine").mkdir()
    (folder / "moved").rename(parents[place] / "mine" / "images")
    description = _describe(folder, "path: mine\ntrain: images/train\nnc: 3\n")
    assert description.root == parents[place] / "mine"
    assert len(Dataset.load(description, "train")) == 3


def test_an_exporters_parent_paths_are_understood(folder: Path) -> None:
    _picture(folder / "train" / "images" / "a.png")
    description = _describe(folder, "train: ../train/images\nnames: [x]\nroboflow: {version: 3}\n")
    assert len(Dataset.load(description, "train")) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: images/train\nnc: 2\nnames: [x, y, z]\n", "3 names"),
        ("train: images/train\nnc: true\nnames: [x]\n", "number of classes"),
        ("train: images/train\nnames: {0: x, 2: y}\n", "without gaps"),
        ("train: images/train\nnames: x\n", "list of names"),
        ("train: images/train\n", "class names"),
        ("nc: 1\nnames: [x]\n", "names no pictures"),
        ("trian: images/train\nnames: [x]\n", "did you mean 'train'"),
        ("train: 3\nnames: [x]\n", "must be a folder"),
        ("train: images/train\npath: 7\nnames: [x]\n", "must be a folder"),
        ("train: images/train\nnames: [x]\nkpt_shape: 17\n", "kpt_shape.*must be"),
        ("train: images/train\nnames: [x]\nkpt_shape: [17, 4]\n", "kpt_shape.*must be"),
        ("train: images/train\nnames: [x]\nkpt_shape: [0, 3]\n", "kpt_shape.*must be"),
        ("train: images/train\nnames: [x]\nkpt_shape: [true, 2]\n", "kpt_shape.*must be"),
        ("train: images/train\nnames: [x]\nkpt_shape: [2, 3]\nflip_idx: [0, 2]\n", "0 to 1 .*each once"),
        ("train: images/train\nnames: [x]\nkpt_shape: [2, 3]\nflip_idx: 1\n", "each once"),
        ("train: images/train\nnames: [x]\nflip_idx: [1, 0]\n", "flip_idx.*needs `kpt_shape"),
        ("train: !!python/object/apply:os.system ['true']\nnames: [x]\n", "data.yaml:1"),
    ],
)
def test_a_wrong_description_is_a_usage_error_that_says_what(folder: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        _describe(folder, text)
    assert "data.yaml" in str(caught.value)


def test_a_missing_dataset_names_the_path_and_the_remedy(folder: Path) -> None:
    with pytest.raises(DataError, match=r"/nowhere/at/all.*fix `path:`"):
        _describe(folder, "path: /nowhere/at/all\ntrain: images\nnames: [x]\n")
    description = _describe(folder, "train: images/train\nval: gone\nnames: [x, y, z]\n")
    with pytest.raises(DataError, match="gone is not there"):
        Dataset.load(description, "val")
    with pytest.raises(DataError, match="no `test:`"):
        Dataset.load(description, "test")


def test_unusable_pairs_are_skipped_counted_and_named(folder: Path) -> None:
    (folder / "images" / "train" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "labels" / "train" / "a.txt").write_text("0 .5 .5 .1 .1\n0 7 .5 .1 .1\n")
    (folder / "labels" / "train" / "b.txt").write_text("9 .5 .5 .1 .1\n")
    description = DatasetDescription.from_yaml(folder / "data.yaml")
    dataset = Dataset.load(description, "train")
    assert [path.name for path in dataset.images] == ["c.png"]
    assert dataset.skipped == 3
    text = "\n".join(map(str, dataset.problems))
    for part in ("a.txt:2: x=7", "b.txt:1: class 9", "broken.jpg: "):
        assert part in text
    with pytest.raises(DataError, match=r"--strict \(3\)"):
        Dataset.load(description, "train", strict=True)


def test_a_split_of_nothing_usable_is_an_error(folder: Path) -> None:
    for path in (folder / "images" / "train").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"none is usable \(3\)"):
        Dataset.load(DatasetDescription.from_yaml(folder / "data.yaml"), "train")


def test_links_to_folders_are_followed_and_a_loop_of_them_ends(folder: Path) -> None:
    outside = folder / "outside" / "images"
    _picture(outside / "far.png", labels=None)
    (folder / "images" / "train" / "far").symlink_to(outside)
    (folder / "images" / "train" / "loop").symlink_to(folder / "images" / "train")
    dataset = Dataset.load(DatasetDescription.from_yaml(folder / "data.yaml"), "train")
    assert len(dataset) == 4


def test_digest_follows_the_content_and_not_the_place(folder: Path, tmp_path: Path) -> None:
    def digest(where: Path) -> str:
        return Dataset.load(DatasetDescription.from_yaml(where / "data.yaml"), "train").digest

    first = digest(folder)
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    folder.rename(moved)
    assert digest(moved) == first
    (moved / "labels" / "train" / "a.txt").write_text("0 .5 .5 .3 .2\n")  # an edit of the same size
    assert digest(moved) != first


def test_every_finding_has_its_row_in_the_report(folder: Path) -> None:
    pictures, labels = folder / "images" / "train", folder / "labels" / "train"
    (pictures / "broken.jpg").write_bytes(b"")
    (labels / "broken.txt").touch()
    (labels / "a.txt").write_text("0 .5 .5 .1 .1\n0 .5 .5 .1 .1\n")
    (labels / "b.txt").write_text("9 .5 .5 .1 .1\n0 7 .5 .1 .1\n")
    (labels / "c.txt").unlink()
    (labels / "nobody.txt").write_text("0 .5 .5 .1 .1\n")
    (labels / "classes.txt").write_text("x\ny\nz\n")
    dataset = Dataset.load(DatasetDescription.from_yaml(folder / "data.yaml"), "train")
    assert write_report(folder / "report.csv", dataset.findings) == 6
    with open(folder / "report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(Path(row["file"]).name, row["line"], row["problem"]) for row in rows] == [
        ("broken.jpg", "", "empty file"),
        ("c.png", "", "no label file, so taken for background"),
        ("a.txt", "2", "the same as line 1, left out"),
        ("b.txt", "1", "class 9 but the dataset has 3 (0 to 2)"),
        ("b.txt", "2", "x=7 outside [0,1]"),
        ("nobody.txt", "", "a label file without a picture, not used"),
    ]
    assert all(row["remedy"] for row in rows)


def test_labels_of_pictures_that_a_list_leaves_out_are_no_orphans(folder: Path) -> None:
    (folder / "some.txt").write_text("images/train/a.png\n")
    description = _describe(folder, "train: some.txt\nnames: [x, y, z]\n")
    assert not Dataset.load(description, "train").findings


def test_text_files_among_the_pictures_are_not_taken_for_labels(folder: Path) -> None:
    _picture(folder / "flat" / "a.png", labels=None)
    (folder / "flat" / "a.txt").write_text("0 .5 .5 .1 .1\n")
    (folder / "flat" / "README.txt").write_text("hello\n")
    assert not Dataset.load(_describe(folder, "train: flat\nnames: [x]\n"), "train").findings


def test_progress_ends_at_the_total(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    Dataset.load(
        DatasetDescription.from_yaml(folder / "data.yaml"), "train", progress=lambda *at: seen.append(at)
    )
    assert seen[-1] == (3, 3)


def test_loading_writes_nothing_into_the_dataset(folder: Path) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
    dataset = Dataset.load(DatasetDescription.from_yaml(folder / "data.yaml"), "train")
    assert np.all(dataset.stamps[:, 0] > 0)
    assert before == sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
