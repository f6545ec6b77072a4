"""Dataset descriptions and the pairs found through them."""

from __future__ import annotations

import csv
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from starling.core.errors import DataError, UsageError
from starling.data.dataset.account import left_out
from starling.data.dataset.dataset import Dataset, DatasetDescription
from starling.data.dataset.findings import write_report


def _image(path: Path, hw: tuple[int, int] = (20, 30), labels: str | None = "0 .5 .5 .2 .2\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", hw[::-1], (10, 20, 30)).save(path)
    if labels is not None:
        folder = Path(*("labels" if part == "images" else part for part in path.parent.parts))
        label = folder / f"{path.stem}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(labels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset of three training images and one for validation."""
    for name in "cab":
        _image(tmp_path / "images" / "train" / f"{name}.png", labels=f"{'abc'.index(name)} .5 .5 .2 .2\n")
    _image(tmp_path / "images" / "val" / "v.png", labels=None)
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


def test_an_image_without_labels_is_background(folder: Path) -> None:
    dataset = Dataset.load(DatasetDescription.from_yaml(folder / "data.yaml"), "val")
    assert dataset.labels[0].shape == (0, 5)


def test_a_changed_kpt_shape_changes_the_rows_and_the_digest(folder: Path) -> None:
    row = "0 .3 .4 .1 .12 .27 .36 .33 .36 .3 .4 .27 .44 .33 .44\n"
    for path in (folder / "labels" / "train").iterdir():
        path.write_text(row)
    text = "train: images/train\nnames: [x]\n"
    polygons = Dataset.load(_describe(folder, text), "train")
    boxes = Dataset.load(_describe(folder, f"{text}kpt_shape: [5, 2]\nflip_idx: [1, 0, 2, 4, 3]\n"), "train")
    assert boxes.labels[0].tolist() == [pytest.approx([0, 0.3, 0.4, 0.1, 0.12])]
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
    _image(folder / "train" / "images" / "a.png")
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
        ("nc: 1\nnames: [x]\n", "names no images"),
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
    with pytest.raises(DataError, match=r"images/train lies beside the YAML: write `path: \.`"):
        _describe(folder, "path: D:\\sets\\mine\ntrain: images/train\nnames: [x]\n")
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
    _image(outside / "far.png", labels=None)
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
    images, labels = folder / "images" / "train", folder / "labels" / "train"
    (images / "broken.jpg").write_bytes(b"")
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
        ("nobody.txt", "", "a label file without an image, not used"),
    ]
    assert all(row["remedy"] for row in rows)


def test_labels_of_images_that_a_list_leaves_out_are_no_orphans(folder: Path) -> None:
    (folder / "some.txt").write_text("images/train/a.png\n")
    description = _describe(folder, "train: some.txt\nnames: [x, y, z]\n")
    assert not Dataset.load(description, "train").findings


def test_labels_beside_the_images_of_a_folder_named_images_are_used(folder: Path) -> None:
    (folder / "labels" / "train" / "b.txt").rename(folder / "images" / "train" / "b.txt")
    dataset = Dataset.load(DatasetDescription.from_yaml(folder / "data.yaml"), "train")
    assert [rows[0, 0] for rows in dataset.labels] == [0, 1, 2]
    assert not dataset.findings


def test_a_label_file_beside_an_image_that_has_one_in_labels_is_named_and_not_read(folder: Path) -> None:
    (folder / "images" / "train" / "b.txt").write_text("2 .5 .5 .2 .2\n")
    (folder / "images" / "train" / "notes.txt").write_text("hello\n")
    dataset = Dataset.load(DatasetDescription.from_yaml(folder / "data.yaml"), "train")
    assert [rows[0, 0] for rows in dataset.labels] == [0, 1, 2]
    (finding,) = dataset.findings
    assert finding.file == str(folder / "images" / "train" / "b.txt")
    assert str(folder / "labels" / "train" / "b.txt") in finding.problem


def test_jfif_and_jpe_are_jpeg_and_other_images_are_counted_by_suffix(folder: Path) -> None:
    images, labels = folder / "images" / "train", folder / "labels" / "train"
    for name in ("d.jfif", "e.JPE"):
        Image.new("RGB", (30, 20)).save(images / name, "JPEG")
        (labels / name).with_suffix(".txt").write_text("0 .5 .5 .2 .2\n")
    for name in ("f.avif", "g.HEIC", "h.avif", "i.ppm", "notes.md"):
        (images / name).write_bytes(b"x")
    (labels / "g.txt").write_text("0 .5 .5 .2 .2\n")
    dataset = Dataset.load(DatasetDescription.from_yaml(folder / "data.yaml"), "train")
    assert len(dataset) == 5
    first, second = dataset.left_out.lines()
    assert "images of a kind that is not read: 4 (.avif 2, .heic 1, .ppm 1)" in first
    assert "label files that are not read: 1, first" in second
    assert [row["count"] for row in dataset.left_out.as_list()] == [4, 1]
    texts = [str(finding) for finding in dataset.findings]
    assert any(".avif 2, .heic 1, .ppm 1" in text for text in texts)
    assert any("g.txt: not used: g.HEIC is of a kind that is not read" in text for text in texts)
    assert len(texts) == 2


def test_a_split_of_images_that_are_not_read_alone_says_so(folder: Path) -> None:
    (folder / "heic").mkdir()
    (folder / "heic" / "a.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"images of a kind that is not read: 1 \(\.heic 1\)"):
        Dataset.load(_describe(folder, "train: heic\nnames: [x]\n"), "train")


def test_hidden_copies_are_neither_data_nor_faults(folder: Path) -> None:
    images, labels = folder / "images" / "train", folder / "labels" / "train"
    for name in ("._a.png", "Thumbs.db", ".DS_Store", ".hidden.avif"):
        (images / name).write_bytes(b"x")
    for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git"):
        _image(images / name / "copy.png", labels=None)
    (labels / "._a.txt").write_bytes(b"\0")
    (folder / "some.txt").write_text("images/train/a.png\nimages/train/._a.png\n__MACOSX/images/a.png\n")
    for split in ("images/train", "some.txt"):
        dataset = Dataset.load(_describe(folder, f"train: {split}\nnames: [x, y, z]\n"), "train")
        assert len(dataset) == (1 if split == "some.txt" else 3)
        assert not dataset.findings
        assert not len(dataset.left_out)


def test_the_account_counts_images_rows_and_label_files_and_clipped_rows_stay(folder: Path) -> None:
    labels = folder / "labels" / "train"
    (folder / "images" / "train" / "a.png").write_bytes(b"")
    (labels / "b.txt").write_text("0 .5 .5 .1 .1\n0 .5 .5 .1 .1\n0 1.005 .5 .1 .1\n")
    (labels / "nobody.txt").touch()
    dataset = Dataset.load(DatasetDescription.from_yaml(folder / "data.yaml"), "train")
    assert [(row["reason"], row["count"]) for row in dataset.left_out.as_list()] == [
        ("images that cannot be used, or whose labels cannot", 1),
        ("label rows that repeat another or have no size", 1),
        ("label files that are not read", 1),
    ]
    assert dataset.clipped == 1
    assert len(dataset.labels[0]) == 2
    lines = "\n".join(left_out(dataset))
    assert "1 label rows with a value up to 0.01 outside [0, 1], clipped" in lines
    assert all(line in lines for line in dataset.left_out.lines())


@pytest.mark.parametrize(
    "lines",
    [
        "images\\train\\a.png\r\nimages\\train\\b.png\r\n",
        "C:\\sets\\mine\\images\\train\\a.png\nC:\\sets\\mine\\images\\train\\b.png\n",
        "data/images/train/a.png\ndata/images/train/b.png\n",
        "/content/mine/images/train/a.png\r/content/mine/images/train/b.png\r",
        ".\\images\\train\\a.png\n./images/train/b.png\n",
        "'images/train/a.png'\n\"images\\train\\b.png\"\n",
        "# written by hand\nimages/train/a.png\n\nimages/train/b.png\n",
    ],
)
def test_a_list_that_was_written_on_another_machine_is_found(folder: Path, lines: str) -> None:
    (folder / "some.txt").write_text(lines)
    dataset = Dataset.load(_describe(folder, "train: some.txt\nnames: [x, y, z]\n"), "train")
    assert [path.name for path in dataset.images] == ["a.png", "b.png"]
    assert not dataset.problems


@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_images_labels_and_lists_meet_in_either_encoding_of_accents(folder: Path, written: str) -> None:
    other = "NFD" if written == "NFC" else "NFC"
    name, elsewhere = (unicodedata.normalize(form, "\u00e9") for form in (written, other))
    _image(folder / "images" / "more" / f"{name}.png")
    (folder / "labels" / "more" / f"{name}.txt").rename(folder / "labels" / "more" / f"{elsewhere}.txt")
    (folder / "some.txt").write_text(f"images/more/{elsewhere}.png\n", encoding="utf-8")
    dataset = Dataset.load(_describe(folder, "train: some.txt\nnames: [x, y, z]\n"), "train")
    assert dataset.boxes == 1
    assert not dataset.findings


def test_list_entries_that_are_not_there_are_one_message_with_their_likely_path(folder: Path) -> None:
    (folder / "some.txt").write_text("\n".join(f"pics/{name}.png" for name in "abc"))
    description = _describe(folder, "train: some.txt\nnames: [x, y, z]\n")
    with pytest.raises(DataError, match=r"3 of 3 entries are not there, first 'pics/a\.png'") as caught:
        Dataset.load(description, "train")
    assert f"{folder}/images/train/a.png may be meant" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_likely_path_of_a_list_entry_is_told_by_its_folders_where_two_files_have_its_name(
    folder: Path,
) -> None:
    _image(folder / "images" / "more" / "a.png")
    (folder / "some.txt").write_text("mine/Images/Train/a.png\n")
    with pytest.raises(DataError, match=f"; {folder}/images/train/a.png may be meant"):
        Dataset.load(_describe(folder, "train: some.txt\nnames: [x, y, z]\n"), "train")


def test_the_entries_of_a_list_that_are_not_there_are_one_finding_beside_those_that_are(folder: Path) -> None:
    (folder / "some.txt").write_text(
        "images/train/a.png\nother/images/train/b.png\n"
        + "\n".join(f"gone/{number}.png" for number in range(50))
    )
    description = _describe(folder, "train: some.txt\nnames: [x, y, z]\n")
    dataset = Dataset.load(description, "train")
    assert len(dataset) == 1
    assert dataset.skipped == 51
    (finding,) = dataset.problems
    assert str(finding).startswith(f"{folder}/some.txt:2: 51 of 52 entries are not there")
    assert f"{folder}/images/train/b.png may be meant" in finding.remedy
    with pytest.raises(DataError, match="51 of 52"):
        Dataset.load(description, "train", strict=True)


def test_a_list_with_a_name_that_no_file_system_takes_is_told_like_any_other(folder: Path) -> None:
    (folder / "some.txt").write_text("images/train/a.png\n" + "x" * 5000 + ".png\n")
    dataset = Dataset.load(_describe(folder, "train: some.txt\nnames: [x, y, z]\n"), "train")
    assert len(dataset) == 1
    assert len(dataset.problems) == 1


@pytest.mark.parametrize("entry", ["images\\train", ".\\images\\train", "..\\images\\train"])
def test_a_description_with_the_separators_of_windows_is_understood(folder: Path, entry: str) -> None:
    assert len(Dataset.load(_describe(folder, f"path: .\ntrain: {entry}\nnames: [x, y, z]\n"), "train")) == 3


def test_an_entry_that_is_not_there_is_told_with_its_likely_path(folder: Path) -> None:
    for entry in ("C:\\mine\\images\\train", "Images/Train", "/content/mine/images/train"):
        description = _describe(folder, f"path: .\ntrain: {entry}\nnames: [x, y, z]\n")
        with pytest.raises(DataError, match=f"is not there; {folder}/images/train is there"):
            Dataset.load(description, "train")


def test_an_entry_that_is_there_and_holds_no_images_says_what_it_is(folder: Path) -> None:
    with zipfile.ZipFile(folder / "set.zip", "w") as archive:
        archive.writestr("a", "b")
    (folder / "boxes.csv").touch()
    for entry, said in (
        ("set.zip", "is a zip archive; unpack it"),
        ("boxes.csv", "is a CSV table, not a folder"),
    ):
        with pytest.raises(DataError, match=said):
            Dataset.load(_describe(folder, f"train: {entry}\nnames: [x]\n"), "train")


def test_text_files_among_the_images_are_not_taken_for_labels(folder: Path) -> None:
    _image(folder / "flat" / "a.png", labels=None)
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
