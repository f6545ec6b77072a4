"""A weights file of another family is named as that, in one message, and never unpickled."""

from __future__ import annotations

import io
import json
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from starling.cli import data as data_command
from starling.core.errors import CheckpointError
from starling.model.families import family_of_tensors, foreign_kind
from starling.model.initial_weights import local_weights, read_weights
from tests.classic_files import stub_class, stub_modules
from tests.security.hostile_archives import crowded_zip

U = "ultralytics.nn.modules"
TASKS = "ultralytics.nn.tasks"
FAMILIES: list[tuple[str, dict[str, str], str]] = [
    ("YOLOv8", {"DetectionModel": TASKS, "C2f": f"{U}.block", "Detect": f"{U}.head"}, "yolov8n.yaml"),
    ("YOLO11", {"DetectionModel": TASKS, "C3k2": f"{U}.block", "C2PSA": f"{U}.block"}, "yolo11n.yaml"),
    ("YOLO12", {"DetectionModel": TASKS, "A2C2f": f"{U}.block", "C3k2": f"{U}.block"}, "yolov12n.yaml"),
    ("YOLO26", {"DetectionModel": TASKS, "C3k2": f"{U}.block"}, "yolo26n.yaml"),
    (
        "YOLOv10",
        {"YOLOv10DetectionModel": TASKS, "C2f": f"{U}.block", "v10Detect": f"{U}.head"},
        "yolov10n.yaml",
    ),
    (
        "YOLOv9",
        {"DetectionModel": "models.yolo", "RepNCSPELAN4": "models.common", "DDetect": "models.yolo"},
        "",
    ),
    ("YOLOv7", {"Model": "models.yolo", "SPPCSPC": "models.common", "IDetect": "models.yolo"}, ""),
    ("YOLOv6", {"Model": "yolov6.models.yolo", "RepVGGBlock": "yolov6.layers.common"}, ""),
    ("RT-DETR", {"RTDETRDetectionModel": TASKS, "RTDETRDecoder": f"{U}.head"}, "rtdetr-l.yaml"),
    ("YOLOX", {"YOLOX": "yolox.models.yolox"}, ""),
    ("YOLO-NAS", {"YoloNAS_S": "super_gradients.training.models"}, ""),
    ("torchvision", {"FasterRCNN": "torchvision_double.models"}, ""),
    ("segmentation", {"SegmentationModel": "models.yolo", "Segment": "models.yolo"}, ""),
    ("YOLOv8 checkpoint for pose", {"PoseModel": TASKS, "C2f": f"{U}.block"}, "yolov8n-pose.yaml"),
]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(("family", "places", "layout"), FAMILIES, ids=[row[0] for row in FAMILIES])
def test_a_checkpoint_of_another_family_is_named(
    tmp_path: Path,
    family: str,
    places: dict[str, str],
    layout: str,
    legacy: bool,
    protocol: int,
) -> None:
    places = {
        name: place.replace("torchvision_double", "torchvision.double") for name, place in places.items()
    }
    path = tmp_path / "x.pt"
    with stub_modules(*places.values()):
        top, *others = (stub_class(place, name)() for name, place in places.items())
        top.yaml_file = layout
        top.model = nn.Sequential(nn.Conv2d(3, 8, 3), *others)
        content = {"model": top, "epoch": -1}
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: a")
    assert family in message
    assert len(message.splitlines()) == 1
    assert "yolov5s.pt" in message


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("backbone.backbone.stem.conv.conv.weight", "YOLOX"),
        ("backbone.ERBlock_2.0.rbr_dense.conv.weight", "YOLOv6"),
        ("roi_heads.box_head.fc6.weight", "torchvision"),
        ("head.classification_head.conv.0.weight", "torchvision"),
        ("model.22.dfl.conv.weight", "YOLOv8"),
        ("model.28.enc_score_head.weight", "RT-DETR"),
        ("module.bbox_head.conv.weight", "MMDetection"),
        ("layer1.0.conv1.weight", "classifier"),
    ],
)
def test_a_plain_state_dict_of_another_family_is_named(tmp_path: Path, name: str, family: str) -> None:
    path = tmp_path / "x.pth"
    torch.save({"model": OrderedDict({name: torch.zeros(2), "other.weight": torch.zeros(2)})}, path)
    with pytest.raises(CheckpointError, match=family):
        read_weights(path)


def test_a_plain_state_dict_of_yolov5_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "plain.pt"
    torch.save(
        OrderedDict({"model.0.conv.weight": torch.zeros(2), "model.24.m.0.bias": torch.zeros(2)}), path
    )
    assert set(read_weights(path).state) == {"model.0.conv.weight", "model.24.m.0.bias"}
    assert family_of_tensors(["model.0.conv.weight", "model.24.anchors", "model.24.m.0.bias"]) is None


def torchscript() -> bytes:
    written = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Conv2d(3, 1, 1), torch.zeros(1, 3, 4, 4)), written)
    return written.getvalue()


def zipped(name: str) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        archive.writestr(name, b"x")
    return written.getvalue()


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("a TorchScript program", torchscript),
        ("an ONNX model", b"\x08\x08\x12\x07pytorch\x1a\x052.1.0" + bytes(100)),
        ("a TensorRT engine", b"ftrt" + bytes(200)),
        (
            "a TensorRT engine",
            (40).to_bytes(4, "little") + json.dumps({"stride": 32}).encode() + b" " * 26 + b"ftrt",
        ),
        (
            "a safetensors file",
            (60).to_bytes(8, "little") + b'{"__metadata__":{"format":"pt"}}' + b" " * 28 + bytes(64),
        ),
        ("a TensorFlow Lite model", b"\x1c\0\0\0TFL3" + bytes(64)),
        ("an HDF5 file", b"\x89HDF\r\n\x1a\n" + bytes(64)),
        ("a pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        ("a web page", b"<!DOCTYPE html><html>Sign in</html>"),
        ("a gzip archive", b"\x1f\x8b\x08\0" + bytes(30)),
        ("a zip archive without a checkpoint", lambda: zipped("images/a.jpg")),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named_for_what_it_is(
    tmp_path: Path, kind: str, content: Any
) -> None:
    path = tmp_path / "renamed.pt"
    path.write_bytes(content() if callable(content) else content)
    with pytest.raises(CheckpointError, match=kind) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)


def test_a_zip_is_named_by_what_can_be_unpacked_in_bounded_memory_alone(tmp_path: Path) -> None:
    content = b"cultralytics.nn.modules\nC2f\n"
    for method, kind in ((zipfile.ZIP_STORED, "a YOLOv8 checkpoint"), (zipfile.ZIP_BZIP2, None)):
        with zipfile.ZipFile(tmp_path / "a.pt", "w", method) as archive:
            archive.writestr("a/data.pkl", content)
        assert foreign_kind(tmp_path / "a.pt") == kind
    (tmp_path / "crowded.pt").write_bytes(crowded_zip())
    assert foreign_kind(tmp_path / "crowded.pt") is None


@pytest.mark.parametrize(
    ("name", "family", "instead"),
    [
        ("yolov8n.pt", "YOLOv8", "yolov5n.pt"),
        ("yolov8n", "YOLOv8", "yolov5n.pt"),
        ("weights/YOLOv8x.pt", "YOLOv8", "yolov5x.pt"),
        ("yolov8m-seg.pt", "YOLOv8 for segmentation", "yolov5m.pt"),
        ("yolov8s-worldv2.pt", "YOLO-World", "yolov5s.pt"),
        ("yolov6s.pt", "YOLOv6", "yolov5s.pt"),
        ("yolov6l6.pt", "YOLOv6", "yolov5l6.pt"),
        ("yolov7-tiny.pt", "YOLOv7", "yolov5n.pt"),
        ("yolov7.pt", "YOLOv7", "yolov5s.pt"),
        ("yolov9c.pt", "YOLOv9", "yolov5s.pt"),
        ("yolov10b.pt", "YOLOv10", "yolov5s.pt"),
        ("yolo11n.pt", "YOLO11", "yolov5n.pt"),
        ("yolov12l.pt", "YOLO12", "yolov5l.pt"),
        ("yolo26s.pt", "YOLO26", "yolov5s.pt"),
        ("yolo26s-pose.pt", "YOLO26 for poses", "yolov5s.pt"),
        ("yolov3-sppu.pt", "YOLOv3u", "yolov5s.pt"),
        ("yolov4.weights", "YOLOv4", "yolov5s.pt"),
        ("yolo_nas_s.pt", "YOLO-NAS", "yolov5s.pt"),
        ("yolox_s.pth", "YOLOX", "yolov5s.pt"),
        ("yoloe-11l-seg.pt", "YOLOE", "yolov5l.pt"),
        ("rtdetr-l.pt", "RT-DETR", "yolov5l.pt"),
        ("rf-detr-base.pth", "RF-DETR", "yolov5s.pt"),
        ("sam2_b.pt", "Segment Anything", "yolov5s.pt"),
        ("FastSAM-s.pt", "FastSAM", "yolov5s.pt"),
        ("yolov5s-seg.pt", "YOLOv5 for segmentation", "yolov5s.pt"),
        ("yolov5m-cls.pt", "YOLOv5 for classification", "yolov5m.pt"),
    ],
)
def test_the_name_of_another_familys_weights_is_known_and_what_serves_here(
    name: str, family: str, instead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        local_weights(name)
    message = str(caught.value)
    assert message.startswith(f"--weights {name}: no such file here ({tmp_path / name}), and by its name ")
    assert f"weights of {family}" in message
    assert f"give {instead}, which is fetched, or the path" in message
    assert ("anchor-free head" in message) == (family == "YOLOv3u")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("name", ["yolov5nu.pt", "yolov5x6u"])
def test_weights_of_yolov5u_are_read_but_not_fetched(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=f"are read, but not fetched: .* --cfg {name.removesuffix('.pt')}.yaml"
    ):
        local_weights(name)


@pytest.mark.parametrize(
    "name", ["best.pt", "yolov5t.pt", "yolov5s-mine.pt", "yolov8-run/best.pt", "sample.pt", "yolo.pt"]
)
def test_other_names_are_no_familys(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        local_weights(name)
    assert "by its name" not in str(caught.value)


def test_weights_of_another_family_are_not_downloaded_as_a_dataset(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert data_command.main(["download", "yolov8n.pt"]) == 2
    assert "weights of YOLOv8" in capsys.readouterr().err
