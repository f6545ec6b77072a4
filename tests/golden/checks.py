"""Checks of this project's formulas against a folder of golden vectors. A check passes or raises MismatchError."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from starling.boxes.geometry import iou_aligned_xywh
from starling.boxes.matching import match_detections
from starling.boxes.nms import non_max_suppression
from starling.config.shipped import SHIPPED
from starling.data.augment.letterbox import boxes_to_original, letterbox_geometry
from starling.metrics import average_precision
from starling.model.anchor_free.loss import AnchorFreeGains, AnchorFreeLoss, Flat
from starling.model.detector import Detector, build_detector
from starling.model.foreign import read_foreign_checkpoint
from starling.model.loss import DetectionLoss, LossGains
from starling.model.weights import load_weights

REQUIRED_LAYOUTS = (
    *(f"yolov5{size}{level}" for level in ("", "6") for size in "nsmlx"),
    *(f"yolov5-{kind}" for kind in ("p2", "p34", "p6", "p7", "fpn", "bifpn", "panet")),
    *(f"yolov5s-{kind}" for kind in ("ghost", "transformer", "LeakyReLU")),
    *("yolov3", "yolov3-spp", "yolov3-tiny"),
)
LOSS_CASES = ("anchor_t_2", "base", "focal", "no_targets", "one_class", "p6", "pos_weight", "smooth")
ANCHOR_FREE = "anchor_free"
"""The folder of the vectors of the anchor-free head."""
ANCHOR_FREE_LAYOUTS = tuple(f"yolov5{size}{level}u" for level in ("", "6") for size in "nsmlx")
ANCHOR_FREE_LOSS_CASES = ("base", "crowd", "gains", "no_targets", "one_class", "tiny")
NMS_CALLS: Mapping[str, Mapping[str, Any]] = {
    "predict": {"conf": 0.25, "iou": 0.45},
    "validate": {"conf": 0.001, "iou": 0.6, "multi_label": True},
    "agnostic": {"conf": 0.25, "iou": 0.45, "agnostic": True},
    "classes_0_2": {"conf": 0.3, "iou": 0.5, "classes": (0, 2)},
    "max_det_10": {"conf": 0.1, "iou": 0.5, "max_detections": 10},
}
FOREIGN = "peer_checkpoint_bccd.pt"
"""A checkpoint that the classic trainer wrote. Its trainer's licence keeps it out of this project: checked where it is."""


class MismatchError(Exception):
    """An answer that differs from its vector."""


class Check(NamedTuple):
    """One line of the report: `run` returns a note, or raises."""

    name: str
    run: Callable[[], str]


def collect(folder: Path) -> list[Check]:
    """Return every check of `folder`; a file that is missing or unreadable gives a check that fails.

    The foreign checkpoint alone may be missing. Vectors of the anchor-free head are in the folder `anchor_free`.
    """
    groups: list[tuple[str, Callable[[Path], Iterator[Check]]]] = [("model_sizes.json", _sizes)]
    groups += [(name, _state_dict) for name in _names(folder, "state_dict_*.txt", ("yolov5n", "yolov5n6"))]
    groups += [("forward.npz", _forward)]
    groups += [(name, _loss) for name in _names(folder, "loss_*.npz", LOSS_CASES)]
    groups += [("iou.npz", _iou), ("nms.npz", _nms), ("average_precision.npz", _average_precision)]
    groups += [("letterbox.json", _letterbox)]
    groups += _anchor_free_groups(folder)
    if (folder / FOREIGN).exists():
        groups += [(FOREIGN, foreign)]
    checks: list[Check] = []
    for name, group in groups:
        try:
            found = list(group(folder / name))
            if not found:
                raise MismatchError("holds no case")
        except Exception as error:
            found = [Check(name, _failing(error))]
        checks += found
    return checks


def _anchor_free_groups(folder: Path) -> list[tuple[str, Callable[[Path], Iterator[Check]]]]:
    below = folder / ANCHOR_FREE
    names = [
        ("model_sizes.json", _anchor_free_sizes),
        ("forward.npz", _forward),
        *((name, _anchor_free_state_dict) for name in _names(below, "state_dict_*.txt", ("yolov5nu",))),
        *((name, _anchor_free_loss) for name in _names(below, "loss_*.npz", ANCHOR_FREE_LOSS_CASES)),
    ]
    return [(f"{ANCHOR_FREE}/{name}", group) for name, group in names]


def _names(folder: Path, pattern: str, required: tuple[str, ...]) -> list[str]:
    """Return the required files of a pattern and whatever else of it the folder holds."""
    return sorted({pattern.replace("*", name) for name in required} | {p.name for p in folder.glob(pattern)})


def _failing(error: Exception) -> Callable[[], str]:
    def run() -> str:
        raise error

    return run


def _expect(condition: object, message: str) -> None:
    if not condition:
        raise MismatchError(message)


def _close(name: str, got: Any, expected: Any, *, absolute: float = 0.0, relative: float = 0.0) -> None:
    """Compare arrays of one shape; NaN in the vector or the answer never passes."""
    a, b = np.asarray(got, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    _expect(a.shape == b.shape, f"{name}: shape {a.shape}, the vector has {b.shape}")
    off = np.abs(a - b)
    if not (off <= absolute + relative * np.abs(b)).all():
        raise MismatchError(f"{name}: off by {np.nanmax(off) if off.size else 0:.3g}")


def _layout_path(name: str) -> Path:
    path = SHIPPED / "layouts" / f"{name}.yaml"
    _expect(path.is_file(), f"layout {name} is not shipped")
    return path


def _entries(state_dict: Mapping[str, torch.Tensor]) -> list[str]:
    return [f"{name} {tuple(tensor.shape)}" for name, tensor in state_dict.items()]


def _count(name: str, nc: int) -> Detector:
    """Build on the meta device: shapes without numbers, so that the largest layouts cost nothing."""
    path = _layout_path(name)
    with torch.device("meta"):
        return build_detector(path, nc=nc)


def _sizes(path: Path) -> Iterator[Check]:
    sizes = json.loads(path.read_text())
    keys = {key: key.rpartition("/nc") for key in sizes}
    for layout in REQUIRED_LAYOUTS:
        if layout not in {name for name, _, _ in keys.values()}:
            yield Check(f"model size {layout}", _failing(MismatchError("no vector in model_sizes.json")))
    for key, (name, _, nc) in keys.items():
        yield Check(f"model size {key}", lambda n=name, c=int(nc), s=sizes[key]: _size(n, c, s))


def _size(name: str, nc: int, expected: Mapping[str, Any]) -> str:
    detector = _count(name, nc)
    entries = _entries(detector.state_dict())
    got = {
        "parameters": detector.count_parameters(),
        "state_dict_entries": len(entries),
        "strides": detector.stride.tolist(),
        "anchors_per_level": detector.head.anchors.shape[1],
        "state_dict_crc32": zlib.crc32("\n".join(entries).encode()),
    }
    for key, value in expected.items():
        _expect(got.get(key) == value, f"{key} is {got.get(key)}, the vector has {value}")
    _expect(set(got) == set(expected), f"the vector has {sorted(expected)}")
    return f"{got['parameters']} parameters"


def _state_dict(path: Path) -> Iterator[Check]:
    expected = path.read_text().splitlines()
    name = path.stem.removeprefix("state_dict_")

    def run() -> str:
        # The head's bias holds (nc + 5) numbers for each of three anchors.
        got = _entries(_count(name, _nc_of(expected)).state_dict())
        for line, (ours, theirs) in enumerate(zip(got, expected, strict=False), 1):
            _expect(ours == theirs, f"line {line}: {ours!r}, the vector has {theirs!r}")
        _expect(len(got) == len(expected), f"{len(got)} entries, the vector has {len(expected)}")
        return f"{len(got)} entries"

    yield Check(f"state dict {name}", run)


def _nc_of(entries: list[str]) -> int:
    found = re.fullmatch(r"model\.\d+\.m\.\d+\.bias \((\d+),\)", entries[-1])
    _expect(found, f"the last entry is {entries[-1]!r}, not the head's bias")
    assert found is not None
    return int(found[1]) // 3 - 5


def recipe_weights(detector: Detector) -> None:
    """Fill every entry but anchors, bins and counters by the vectors' recipe: a PCG64 seeded with the name's CRC-32."""
    for name, tensor in detector.state_dict().items():
        if name.endswith(("anchors", "dfl.conv.weight", "num_batches_tracked")):
            continue
        u = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).random(tensor.numel())
        if name.endswith(("running_var", "bn.weight")):
            values = 0.5 + u
        elif tensor.ndim == 1:
            values = (u - 0.5) * 0.2
        else:
            values = (2 * u - 1) * np.sqrt(3 / np.prod(tensor.shape[1:]))
        tensor.copy_(torch.from_numpy(values.reshape(tensor.shape)))


def _forward(path: Path) -> Iterator[Check]:
    vectors = dict(np.load(path))
    for key in vectors:
        if not key.endswith("_decoded"):
            case = key.removesuffix("_input")
            name = "forward" if path.parent.name != ANCHOR_FREE else "anchor-free forward"
            yield Check(f"{name} {case}", lambda c=case: _forward_case(c, vectors))


@torch.no_grad()
def _forward_case(case: str, vectors: Mapping[str, Any]) -> str:
    name, _, nc = case.rpartition("_nc")
    images, expected = torch.from_numpy(vectors[f"{case}_input"]), vectors[f"{case}_decoded"]
    detector = build_detector(_layout_path(name), nc=int(nc)).eval()
    recipe_weights(detector)
    decoded = detector(images)[0]
    _close("decoded", detector.head.exported(decoded), expected, absolute=1e-3)
    if detector.head.anchors_px is None:
        _expect(bool((decoded[..., 4] == 1).all()), "an objectness is not 1")
    return f"{decoded.shape[1]} predictions an image"


def _loss(path: Path) -> Iterator[Check]:
    vectors = dict(np.load(path))
    yield Check(f"loss {path.stem.removeprefix('loss_')}", lambda: _loss_case(vectors))


def _loss_case(vectors: Mapping[str, Any]) -> str:
    strides = vectors["strides"].tolist()
    height, width = vectors["image_hw"].tolist()
    predictions = [torch.from_numpy(vectors[f"prediction_{i}"]).requires_grad_() for i in range(len(strides))]
    for prediction, stride in zip(predictions, strides, strict=True):
        cells = tuple(prediction.shape[2:4])
        _expect(cells == (height / stride, width / stride), f"{cells} cells do not fit image and stride")
    targets = torch.from_numpy(vectors["targets"])
    gains = LossGains(**json.loads(str(vectors["hyp"])))
    anchors = torch.from_numpy(vectors["anchors_in_strides"])
    loss = DetectionLoss(strides, anchors, nc=predictions[0].shape[-1] - 5, gains=gains)
    total, parts = loss(predictions, targets)
    total.backward()
    limit = torch.tensor(gains.anchor_t)
    matched = [
        int(loss.match(level, p.shape, targets, limit).matched.sum()) for level, p in enumerate(predictions)
    ]
    expected = vectors["matched_per_level"].tolist()
    _expect(matched == expected, f"{matched} anchors matched, the vector has {expected}")
    _close("total", total.detach().reshape(vectors["total"].shape), vectors["total"], relative=1e-4)
    _close("box, objectness, class", parts, vectors["box_obj_cls"], relative=1e-4)
    for level, prediction in enumerate(predictions):
        assert prediction.grad is not None
        name = f"gradient_abs_sum_{level}"
        _close(name, prediction.grad.abs().sum(), vectors[name], relative=1e-4)
    return f"total {total.item():.4f}"


def _anchor_free_sizes(path: Path) -> Iterator[Check]:
    vectors = json.loads(path.read_text())
    keys = {key: key.rpartition("/nc") for key in vectors["sizes"]}
    for key, (name, _, nc) in keys.items():
        expected = vectors["sizes"][key]
        yield Check(
            f"anchor-free model size {key}", lambda n=name, c=int(nc), e=expected: _anchor_free_size(n, c, e)
        )
    for layout in ANCHOR_FREE_LAYOUTS:  # not every one has a vector, but each is shipped and can be built
        yield Check(
            f"anchor-free layout {layout}", lambda n=layout: f"{_count(n, 80).count_parameters()} parameters"
        )
    yield Check("anchor-free initial biases", lambda: _anchor_free_biases(vectors["initial_head_bias_nc80"]))


def _anchor_free_size(name: str, nc: int, expected: Mapping[str, Any]) -> str:
    detector = _count(name, nc)
    entries = _entries(detector.state_dict())
    got = {
        "parameters": detector.count_parameters(),
        "state_dict_entries": len(entries),
        "strides": detector.stride.tolist(),
        "state_dict_crc32": zlib.crc32("\n".join(entries).encode()),
    }
    _expect(got == dict(expected), f"{got}, the vector has {dict(expected)}")
    return f"{got['parameters']} parameters"


def _anchor_free_biases(expected: Mapping[str, float]) -> str:
    state = build_detector(_layout_path("yolov5nu"), nc=80).state_dict()
    for name, value in expected.items():
        _close(name, state[name], np.full(tuple(state[name].shape), value), relative=1e-6)
    return f"{len(expected)} biases"


def _anchor_free_state_dict(path: Path) -> Iterator[Check]:
    expected = path.read_text().splitlines()
    name = path.stem.removeprefix("state_dict_")

    def run() -> str:
        got = _entries(_count(name, 80).state_dict())
        _expect(got == expected, f"{set(got) ^ set(expected)} differ, or their order")
        return f"{len(got)} entries"

    yield Check(f"anchor-free state dict {name}", run)


def _anchor_free_loss(path: Path) -> Iterator[Check]:
    vectors = dict(np.load(path))
    yield Check(
        f"anchor-free loss {path.stem.removeprefix('loss_')}", lambda: _anchor_free_loss_case(vectors)
    )


def _anchor_free_loss_case(vectors: Mapping[str, Any]) -> str:
    boxes, scores = (torch.from_numpy(vectors[key]).requires_grad_() for key in ("boxes", "scores"))
    strides, (height, width) = vectors["strides"].tolist(), vectors["image_hw"].tolist()
    sizes = [(int(height // stride), int(width // stride)) for stride in strides]
    flat = torch.cat((boxes, scores), dim=1).split([h * w for h, w in sizes], dim=2)
    predictions = [level.unflatten(2, size) for level, size in zip(flat, sizes, strict=True)]
    targets = torch.from_numpy(vectors["targets"]).reshape(-1, 6)
    gains = AnchorFreeGains(**dict(zip(("box", "cls", "dfl"), vectors["gains"].tolist(), strict=True)))
    loss = AnchorFreeLoss(strides, scores.shape[1], gains)
    total, parts = loss(predictions, targets)
    total.backward()  # type: ignore[no-untyped-call]
    _close(
        "target scores", _target_scores(loss, predictions, targets), vectors["target_scores"], absolute=1e-5
    )
    _close("total", total.detach().reshape(vectors["total"].shape), vectors["total"], relative=1e-4)
    _close("box, class, distribution", parts, vectors["box_cls_dfl"], relative=1e-4)
    for name, tensor in (("boxes", boxes), ("scores", scores)):
        assert tensor.grad is not None
        key = f"gradient_abs_sum_{name}"
        _close(key, tensor.grad.abs().sum().reshape(vectors[key].shape), vectors[key], relative=1e-4)
    return f"total {total.item():.4f}"


@torch.no_grad()
def _target_scores(
    loss: AnchorFreeLoss, predictions: list[torch.Tensor], targets: torch.Tensor
) -> torch.Tensor:
    """Return [B,N,nc]: what the class scores are to learn."""
    flat = Flat.of(predictions, loss.strides, loss.nc)
    assigned = loss.assign(flat, targets)
    return loss.target_scores(flat, assigned, targets)


def _iou(path: Path) -> Iterator[Check]:
    vectors = dict(np.load(path))
    a_xywh, b_xywh = torch.from_numpy(vectors["a_xywh"]), torch.from_numpy(vectors["b_xywh"])

    def run(kind: Any) -> str:
        _close(kind, iou_aligned_xywh(a_xywh, b_xywh, kind)[:, None], vectors[kind], absolute=1e-5)
        return f"{len(a_xywh)} pairs"

    for kind in ("iou", "giou", "diou", "ciou"):
        yield Check(f"IoU {kind}", lambda k=kind: run(k))


def _nms(path: Path) -> Iterator[Check]:
    vectors = dict(np.load(path))
    predictions = torch.from_numpy(vectors["predictions"])

    def run(call: str) -> str:
        found = non_max_suppression(predictions, **NMS_CALLS[call])
        for image, detections in enumerate(found):
            expected = vectors[f"{call}_image{image}"]
            _expect(len(detections) == len(expected), f"{len(detections)} boxes for {len(expected)}")
            _close(f"image {image} boxes", detections[:, :4], expected[:, :4], absolute=1e-3)
            _close(f"image {image} scores and classes", detections[:, 4:], expected[:, 4:], absolute=1e-6)
        return " and ".join(f"{len(d)}" for d in found) + " boxes"

    for call in NMS_CALLS:
        yield Check(f"NMS {call}", lambda c=call: run(c))


def _average_precision(path: Path) -> Iterator[Check]:
    vectors = dict(np.load(path))
    yield Check("average precision", lambda: _average_precision_case(vectors))


def _average_precision_case(vectors: Mapping[str, Any]) -> str:
    images = sorted(int(key.removeprefix("labels_")) for key in vectors if key.startswith("labels_"))
    correct, detections, actual = [], [], []
    for image in images:
        found, labels = vectors[f"detections_{image}"], vectors[f"labels_{image}"]
        matched = match_detections(torch.from_numpy(found), torch.from_numpy(labels)).numpy()
        _close(f"correct of image {image}", matched, vectors[f"correct_{image}"])
        correct.append(matched)
        detections.append(found)
        actual.append(labels[:, 0])
    every = np.concatenate(detections)
    metrics = average_precision(np.concatenate(correct), every[:, 4], every[:, 5], np.concatenate(actual))
    _close("classes", metrics.classes, vectors["classes"])
    for name, got in {
        "precision": metrics.precision_by_class,
        "recall": metrics.recall_by_class,
        "f1": metrics.f1_by_class,
        "ap": metrics.ap,
        "map50": metrics.map50,
        "map50_95": metrics.map5095,
        "fitness": [metrics.fitness],
    }.items():
        _close(name, got, vectors[name], absolute=1e-6)
    return f"{len(images)} images, mAP50 {metrics.map50:.4f}"


def _letterbox(path: Path) -> Iterator[Check]:
    cases = json.loads(path.read_text())
    _expect(cases, "holds no case")

    def run() -> str:
        for index, case in enumerate(cases):
            _letterbox_case(index, case)
        return f"{len(cases)} cases"

    yield Check("letterbox", run)


def _letterbox_case(index: int, case: Mapping[str, Any]) -> None:
    hw = (case["hw"][0], case["hw"][1])
    geometry = letterbox_geometry(hw, case["new"], case["minimal"], case["upscale"])
    for name in ("out_hw", "ratio", "pad_wh"):
        got = getattr(geometry, name)
        got = list(got) if isinstance(got, tuple) else got
        _expect(got == case[name], f"case {index}: {name} is {got}, the vector has {case[name]}")
    (pad_w, pad_h), (out_h, out_w) = geometry.pad_wh, geometry.out_hw
    area_xyxy = np.array([[pad_w, pad_h, out_w - pad_w, out_h - pad_h]])
    back = boxes_to_original(area_xyxy, geometry, hw)[0]
    # The vectors are float32 numbers rounded to three decimals.
    _close(f"case {index}: box_back", back, case["box_back"], absolute=5.1e-4)


def foreign(path: Path) -> Iterator[Check]:
    """Yield the check that a foreign checkpoint is read as data and fits the layout it names."""

    def run() -> str:
        checkpoint = read_foreign_checkpoint(path)
        _expect(checkpoint.layout, "no layout")
        assert checkpoint.layout is not None
        detector = build_detector(checkpoint.layout, nc=checkpoint.nc)
        ours, theirs = _entries(detector.state_dict()), _entries(checkpoint.state_dict)
        _expect(ours == theirs, "its state dict differs from that of its layout")
        load_weights(detector, checkpoint.state_dict, source=str(path))
        for name, tensor in checkpoint.state_dict.items():
            _expect(tensor.dtype in (torch.float32, torch.int64), f"{name} is {tensor.dtype}")
            _expect(tensor.isfinite().all(), f"{name} is not finite")
        _expect(checkpoint.nc == len(checkpoint.names), f"{checkpoint.nc} classes, names {checkpoint.names}")
        _expect(checkpoint.anchors is not None, "no anchors")
        _expect(checkpoint.strides == tuple(detector.stride.tolist()), f"strides {checkpoint.strides}")
        return f"{len(ours)} tensors, classes {', '.join(checkpoint.names)}"

    yield Check("foreign checkpoint", run)
