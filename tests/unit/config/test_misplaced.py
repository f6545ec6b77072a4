"""What is said of a path that is there and is not what is asked for, and of keys that are other trainers'."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from launcher.options.training_args import prepare_args
from launcher.options.training_files import read_dataset
from starling.config.hyp import FOREIGN_KEYS, Hyp
from starling.config.shipped import find_config
from starling.core.errors import CheckpointError, DataError, StarlingError, UsageError
from starling.core.misplaced import misplaced
from starling.data.dataset.dataset import DatasetDescription
from starling.data.fetch.acquire import class_names
from starling.model.initial_weights import find_weights


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a folder, archives, exports and other files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ls" / "images").mkdir(parents=True)
    (tmp_path / "ls" / "classes.txt").write_text("a\nb\n")
    (tmp_path / "with" / "set").mkdir(parents=True)
    (tmp_path / "with" / "set" / "data.yaml").write_text("train: .\n")
    (tmp_path / "run" / "weights").mkdir(parents=True)
    (tmp_path / "run" / "weights" / "best.pt").write_bytes(b"PK\x03\x04")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a", "b")
    (tmp_path / "odd").write_bytes((tmp_path / "set.zip").read_bytes())
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(tmp_path / "ls" / "classes.txt")
    for name in ("best.onnx", "best.engine", "coco.json", "boxes.csv", "train.txt", "layout.yaml"):
        (tmp_path / name).write_text("x: 1\n")
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    return tmp_path


DATA = [
    ("ls", "is a folder without a dataset YAML; write "),
    ("ls", "`train: images`, `val: images` and `names: [...]` (the lines of its classes.txt"),
    ("with", "is a folder; give the dataset YAML in it: "),
    ("with/set", "with/set/data.yaml"),
    ("set.zip", "is a zip archive; unpack it"),
    ("set.tar", "is a tar archive; unpack it"),
    ("odd", "is a zip archive; unpack it"),
    ("best.onnx", "is an ONNX model, not a dataset YAML"),
    ("run/weights/best.pt", "is a .pt file of weights, not a dataset YAML"),
    ("coco.json", "is a JSON file, not a dataset YAML"),
    ("boxes.csv", "starling data convert"),
    ("train.txt", "is a .txt file, not a dataset YAML"),
    ("a.png", "is an image, not a dataset YAML"),
    ("/dev/null", "is no regular file"),
]
WEIGHTS = [
    ("ls", "is a folder without a .pt file"),
    ("run", "is a folder; give a .pt file in it: "),
    ("run/weights", "run/weights/best.pt"),
    ("best.onnx", "is an ONNX model, which is not trained or read here; give the .pt file"),
    ("best.engine", "is a TensorRT engine"),
    ("set.zip", "is a zip archive; unpack it"),
    ("layout.yaml", "a layout goes to --cfg"),
    ("a.png", "is an image, not weights"),
]


@pytest.mark.parametrize(("given", "said"), DATA)
def test_a_dataset_that_is_none_is_told_by_what_it_is(there: Path, given: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        find_config("datasets", given)
    assert str(caught.value).startswith(f"--data {given}: is ")
    assert said in str(caught.value)


@pytest.mark.parametrize(("given", "said"), WEIGHTS)
def test_weights_that_are_none_are_told_by_what_they_are(there: Path, given: str, said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        find_weights(given)
    assert str(caught.value).startswith(f"--weights {given}: is ")
    assert said in str(caught.value)


@pytest.mark.parametrize("kind", ["hyps", "layouts", "spaces"])
@pytest.mark.parametrize("given", ["ls", "set.zip", "a.png", "run/weights/best.pt"])
def test_a_configuration_that_is_none_is_told_by_what_it_is(there: Path, kind: str, given: str) -> None:
    with pytest.raises(UsageError, match=rf"{given}: is an? .*; give a YAML file"):
        find_config(kind, given)  # type: ignore[arg-type]


def test_what_is_asked_for_passes_and_what_is_not_there_is_no_such_file(there: Path) -> None:
    assert find_config("datasets", "layout.yaml") == Path("layout.yaml")
    assert find_weights("run/weights/best") == Path("run/weights/best.pt")
    assert misplaced("--data", there / "nothing") is None
    with pytest.raises(DataError, match="no such file"):
        find_config("datasets", "nothing.yaml")


@pytest.mark.parametrize(
    ("kind", "error"), [("datasets", DataError), ("hyps", UsageError), ("layouts", UsageError)]
)
def test_a_name_too_long_for_any_file_system_is_our_own_error(kind: str, error: type[StarlingError]) -> None:
    with pytest.raises(error, match="File name too long: no file can be there; correct the path"):
        find_config(kind, "n" * 300)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "given"), [("--data", "ls"), ("--data", "set.zip"), ("--weights", "best.onnx")]
)
def test_the_launcher_says_the_same(there: Path, option: str, given: str) -> None:
    with pytest.raises(StarlingError) as launcher:
        prepare_args([option, given], cwd=there, runs=there / "runs", runs_inside="/runs", isolated=True)
    with pytest.raises(StarlingError) as trainer:
        find_config("datasets", given) if option == "--data" else find_weights(given)
    assert str(trainer.value).split(": ", 1)[1].split(";")[0] in str(launcher.value)


@pytest.mark.parametrize("entry", ["images\\train", "../images/train", "..\\images\\train"])
def test_the_launcher_finds_the_folders_that_the_trainer_finds(tmp_path: Path, entry: str) -> None:
    (tmp_path / "images" / "train").mkdir(parents=True)
    yaml = tmp_path / "data.yaml"
    yaml.write_text(f"path: .\ntrain: {entry}\nnames: [x]\n")
    assert read_dataset(yaml).splits == (tmp_path / "images" / "train",)
    assert DatasetDescription.from_yaml(yaml).splits["train"] == read_dataset(yaml).splits
    yaml.write_text("path: .\ntrain: C:\\sets\\images\\train\nnames: [x]\n")
    with pytest.raises(StarlingError, match=f"{tmp_path}/images/train is there"):
        read_dataset(yaml)


@pytest.mark.parametrize("names", ["{'0': a, '1': b}", "{1: b, '0': a}", '{"1": b, "0": a}'])
def test_class_names_with_quoted_numbers_are_in_their_order(tmp_path: Path, names: str) -> None:
    (tmp_path / "images").mkdir()
    yaml = tmp_path / "data.yaml"
    yaml.write_text(f"train: images\nnames: {names}\n")
    assert DatasetDescription.from_yaml(yaml).names == ("a", "b")
    assert class_names(yaml, {"names": {"1": "b", "0": "a"}}, ()) == ("a", "b")


@pytest.mark.parametrize("names", ["{'0': a, 0: b}", "{'1': a, '2': b}", "{x: a}", "{'²': a}", "{0.0: a}"])
def test_class_names_whose_keys_are_not_the_numbers_are_refused(tmp_path: Path, names: str) -> None:
    (tmp_path / "images").mkdir()
    yaml = tmp_path / "data.yaml"
    yaml.write_text(f"train: images\nnames: {names}\n")
    with pytest.raises(UsageError, match="without gaps"):
        DatasetDescription.from_yaml(yaml)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("giou", "the name of `box` in 2020, with the same meaning; write box instead"),
        ("loss_ota", "a key of YOLOv7"),
        ("paste_in", "a key of YOLOv7"),
        ("kobj", "remove the line"),
        ("cutmix", "remove the line"),
        ("epochs", "a setting of Ultralytics' later trainers"),
    ],
)
def test_a_key_of_another_trainer_is_named_as_that(key: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Hyp.from_mapping({"lr0": 0.01, key: 1, "rle": 1}, "hyp.yaml")
    assert str(caught.value).startswith(f"hyp.yaml: '{key}' is ")
    assert said in str(caught.value)
    assert "keys in this file too: rle" in str(caught.value)
    assert "did you mean" not in str(caught.value)


def test_no_key_of_another_trainer_is_one_of_ours() -> None:
    assert not FOREIGN_KEYS.keys() & Hyp().as_dict().keys()
