"""Whatever the classic trainer wrote over the years is read, answers the same, and can be used like our own."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from starling import settings
from starling.cli import export, train, val
from starling.config.shipped import SHIPPED
from starling.config.yaml_reader import read_yaml
from starling.core.errors import CheckpointError
from starling.model.checkpoint import load_checkpoint
from starling.model.detector import Detector, build_detector
from starling.model.foreign import read_foreign_checkpoint
from starling.model.initial_weights import find_initial_weights
from starling.model.torch_file import LEGACY_MAGIC
from starling.model.weights import load_weights
from tests.classic_files import OLD_ACTIVATIONS, OLD_LINE, ClassicFiles, SuccessorFiles, trained

CELLS = ("RBC", "WBC", "Platelets")
OLD = {**OLD_LINE, **OLD_ACTIVATIONS}


@pytest.fixture
def files(tmp_path: Path) -> ClassicFiles:
    return ClassicFiles(tmp_path)


def read_back(path: Path) -> Detector:
    """Build what a file holds by the layout in it, with nothing left out."""
    checkpoint = read_foreign_checkpoint(path)
    assert checkpoint.layout is not None
    detector = build_detector(checkpoint.layout, nc=checkpoint.nc, names=checkpoint.names or None)
    assert not load_weights(detector, checkpoint.state_dict).left_out
    return detector.eval()


def same_answers(one: Detector, other: Detector, side: int = 64) -> bool:
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return torch.equal(one(images)[0], other(images)[0])


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 1.6"])
@pytest.mark.parametrize(
    "way",
    [
        {"names": list(CELLS)},
        {"names": dict(enumerate(CELLS))},
        {"names": {2: "Platelets", 0: "RBC", 1: "WBC"}, "top": "Model"},
        {"half": False},
        {"half": False, "stripped": False, "average": "module"},
        {"stripped": False, "average": "pair", "top": "Model"},
    ],
    ids=str,
)
def test_every_way_to_write_a_detector_is_read_to_the_same_answers(
    files: ClassicFiles, way: dict[str, Any], legacy: bool
) -> None:
    source = trained(OLD, names=CELLS)
    path = files.write(source, legacy=legacy, **way)
    assert path.read_bytes().startswith(LEGACY_MAGIC) == legacy
    detector = read_back(path)
    assert detector.names == CELLS
    assert same_answers(detector, source)
    assert read_foreign_checkpoint(path).epoch == (-1 if way.get("stripped", True) else 12)
    assert "models" not in sys.modules


def test_an_older_activation_of_each_kind_of_block_is_told_apart(files: ClassicFiles) -> None:
    path = files.write(trained(OLD))
    layout = read_foreign_checkpoint(path).layout
    assert layout is not None
    assert {key: value for key, value in layout.items() if "activation" in key} == OLD_ACTIVATIONS
    other = build_detector({**layout, "csp_activation": "nn.SiLU()"}, nc=3).eval()
    load_weights(other, read_foreign_checkpoint(path).state_dict)
    assert not same_answers(other, read_back(path)), "it makes a difference"


@pytest.mark.parametrize(
    "layout",
    ["yolov5n", "yolov5s-ghost", "yolov5s-transformer", "yolov5s-LeakyReLU", "yolov3-tiny", "yolov5-bifpn"],
)
def test_every_kind_of_layout_is_read_from_a_classic_file(files: ClassicFiles, layout: str) -> None:
    from starling.config.shipped import find_config
    from starling.model.layout import read_layout

    small = {"width_multiple": 0.06, "depth_multiple": 0.1} if layout != "yolov5n" else {}
    source = trained({**read_layout(find_config("layouts", layout)), **small})
    path = files.write(source, legacy=layout == "yolov3-tiny")
    assert same_answers(read_back(path), source, side=128)


def test_a_model_of_2020_is_validated_tuned_resumed_and_exported(
    files: ClassicFiles, tiny_data: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings.update({"mlflow": False, "tensorboard": False})
    source = trained(OLD, names=CELLS)
    path = files.write(source, top="Model", stripped=False, legacy=True)
    before = path.read_bytes()
    shared = ["--weights", str(path), "--data", str(tiny_data), "--img", "64", "--device", "cpu"]
    assert val.main([*shared, "--json"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out.splitlines()[-1])["mAP50"] <= 1

    assert train.main([*shared, "--batch", "4", "--epochs", "1", "--noplots", "--noautoanchor"]) == 0
    assert "tensors" in capsys.readouterr().out
    last = runs / "train" / "exp" / "weights" / "last.pt"
    tuned = load_checkpoint(last)
    assert {key: tuned["layout"][key] for key in OLD_ACTIVATIONS} == OLD_ACTIVATIONS
    assert train.main(["--resume", str(last), "--epochs", "2"]) == 0

    assert export.main(["--weights", str(path), "--imgsz", "64", "--include", "torchscript", "onnx"]) == 0
    images = torch.rand(1, 3, 64, 64)
    script = torch.jit.load(str(path.with_suffix(".torchscript")))
    with torch.inference_mode():
        torch.testing.assert_close(script(images), source(images)[0], atol=1e-3, rtol=1e-4)
    assert path.with_suffix(".onnx").is_file()
    assert path.read_bytes() == before


def test_tuning_starts_from_the_weights_of_a_model_of_2020(files: ClassicFiles) -> None:
    source = trained(OLD, names=CELLS)
    started = find_initial_weights(str(files.write(source, top="Model")), "").build(CELLS, None)
    state = started.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in source.state_dict().items())


def test_names_that_are_numbers_are_text_and_names_with_a_gap_are_refused(files: ClassicFiles) -> None:
    source = trained(OLD)
    assert read_foreign_checkpoint(files.write(source, names=[7, 8, 9])).names == ("7", "8", "9")
    for names in ({0: "a", 1: "b", 3: "c"}, ["a", None, "c"], "abc"):
        with pytest.raises(CheckpointError, match=r"classic\.pt: class names are neither"):
            read_foreign_checkpoint(files.write(source, names=names))


# --- the form of torch before 1.6 -----------------------------------------------------------------------


@pytest.fixture
def old_form(files: ClassicFiles) -> Path:
    return files.write(trained(OLD), legacy=True)


def test_a_file_before_1_6_is_refused_wherever_it_is_cut(old_form: Path) -> None:
    whole = old_form.read_bytes()
    for length in [*range(0, len(whole), len(whole) // 40), len(whole) - 1]:
        old_form.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"classic\.pt"):
            read_foreign_checkpoint(old_form)
    assert length == len(whole) - 1
    with pytest.raises(CheckpointError, match=r"classic\.pt: the file is cut short"):
        read_foreign_checkpoint(old_form)


def test_a_global_in_a_file_before_1_6_is_refused_by_name_in_each_of_its_pickles(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    sentinel = tmp_path / "touched"
    attack = f"\x80\x02cos\nsystem\nX{chr(len(f'touch {sentinel}'))}\0\0\0touch {sentinel}\x85R."
    harmless = [
        b"\x80\x02M\xe9\x03.",
        b"\x80\x02}X\r\x00\x00\x00little_endian\x88s.",
        b"\x80\x02}.",
        b"\x80\x02].",
    ]
    path.write_bytes(LEGACY_MAGIC + b"".join(harmless))
    with pytest.raises(CheckpointError, match="holds no detector"):
        read_foreign_checkpoint(path)
    for place in range(4):
        parts = [*harmless[:place], attack.encode("latin1"), *harmless[place + 1 :]]
        path.write_bytes(LEGACY_MAGIC + b"".join(parts))
        with pytest.raises(CheckpointError, match=r"evil\.pt: the pickle names os\.system"):
            read_foreign_checkpoint(path)
    assert not sentinel.exists()


def test_a_storage_before_1_6_that_claims_another_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sizes.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"w": torch.arange(6.0)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    assert read_foreign_checkpoint(path).state_dict["w"].tolist() == [0, 1, 2, 3, 4, 5]
    count = len(whole) - 6 * 4 - 8
    assert whole[count : count + 8] == (6).to_bytes(8, "little")
    path.write_bytes(whole[:count] + (2**60).to_bytes(8, "little") + whole[count + 8 :])
    with pytest.raises(CheckpointError, match="of another size"):
        read_foreign_checkpoint(path)


# Files of the successor, whose head is anchor-free


@pytest.mark.parametrize("layout", ["yolov5nu.yaml", "yolov5n6u.yaml"])
@pytest.mark.parametrize("form", ["settings as a dict", "settings as an object", "before 1.6"])
def test_a_file_of_the_successor_is_read_and_answers_the_same(tmp_path: Path, layout: str, form: str) -> None:
    detector = trained(layout, names=CELLS)
    files = SuccessorFiles(tmp_path)

    def beside() -> dict[str, Any]:
        values = {"box": 7.5, "dfl": 1.5, "data": "bccd.yaml"}
        return {"train_args": files.settings(**values) if form == "settings as an object" else values}

    path = files.write(detector, names=dict(enumerate(CELLS)), beside=beside, legacy=form == "before 1.6")
    again = read_back(path)
    assert again.names == CELLS
    assert again.head.anchors_px is None
    assert same_answers(detector, again, 128)


def test_a_state_dict_of_the_successor_has_its_layout_by_its_shapes(tmp_path: Path) -> None:
    detector = trained("yolov5su.yaml", nc=7)
    torch.save(detector.state_dict(), tmp_path / "plain.pt")
    again = read_back(tmp_path / "plain.pt")
    assert again.nc == 7
    assert same_answers(detector, again)


def test_an_anchor_free_detector_of_another_layout_is_named(tmp_path: Path) -> None:
    layout = {**read_yaml(SHIPPED / "layouts" / "yolov5nu.yaml"), "width_multiple": 0.375}
    path = SuccessorFiles(tmp_path).write(trained(layout))
    with pytest.raises(CheckpointError, match=r"another layout than yolov5nu\.yaml to yolov5x6u\.yaml"):
        read_foreign_checkpoint(path)


def test_a_file_of_the_successor_starts_a_training_and_is_validated(
    tmp_path: Path, tiny_data: Path, runs: Path
) -> None:
    settings.update({"mlflow": False, "tensorboard": False})
    path = SuccessorFiles(tmp_path).write(trained("yolov5nu.yaml", names=CELLS))
    data = ["--data", str(tiny_data), "--img", "64"]
    assert val.main(["--weights", str(path), *data]) == 0
    flags = ["--epochs", "1", "--batch", "4", "--device", "cpu", "--noplots"]
    assert train.main(["--weights", str(path), *data, *flags]) == 0
    best = load_checkpoint(runs / "train" / "exp" / "weights" / "best.pt")
    assert "anchors" not in best["layout"]
