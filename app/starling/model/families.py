"""Name the kind of a file that is not a YOLOv5 checkpoint: weights of another family of detectors, or no checkpoint.

The functions search for words in a bounded part of the file, and unpickle nothing. Their answers consist of words from
the tables in this module, never of text from the file.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path

from starling.core.archives.bounded_zip import open_zip
from starling.core.files.regular import open_regular

SCANNED = 4 << 20
"""Maximum number of pickle bytes that are searched; the pickle of an official checkpoint has under 1 MiB."""

_GLOBAL = re.compile(rb"c([A-Za-z_][\w.]{0,120})\n([A-Za-z_]\w{0,80})\n")
_STACK_GLOBAL = re.compile(rb"\x8c.([A-Za-z_]\w{0,80})(?:\x94|q.|)\x93", re.DOTALL)
_TEXT = re.compile(rb"(?:\x8c.|X.{4})([A-Za-z_][\w.]{2,200})", re.DOTALL)
_YAML = re.compile(rb"(yolo[\w-]{1,24})\.yaml")

_BY_CLASS: tuple[tuple[str, str], ...] = (
    ("RTDETRDecoder RTDETRDetectionModel RTDETR", "an RT-DETR checkpoint"),
    ("WorldModel WorldDetect", "a YOLO-World checkpoint"),
    ("YOLOEModel YOLOESegModel YOLOEDetect", "a YOLOE checkpoint"),
    ("v10Detect YOLOv10DetectionModel C2fCIB", "a YOLOv10 checkpoint"),
    ("A2C2f AAttn ABlock", "a YOLO12 checkpoint"),
    ("C3k2 C2PSA", "a YOLO11 checkpoint"),
    ("RepNCSPELAN4 ELAN1 DualDDetect TripleDDetect DDetect", "a YOLOv9 checkpoint"),
    ("C2f", "a YOLOv8 checkpoint"),
    ("IDetect IAuxDetect IKeypoint SPPCSPC RepConv_OREPA", "a YOLOv7 checkpoint"),
)
"""Classes that only one family has; the first row with one of its classes in the file decides."""
_BY_MODULE: tuple[tuple[str, str], ...] = (
    ("yolov6", "a YOLOv6 checkpoint"),
    ("yolox", "a YOLOX checkpoint"),
    ("super_gradients", "a YOLO-NAS checkpoint"),
    ("ppdet", "a PP-YOLOE checkpoint"),
    ("paddle", "a PP-YOLOE checkpoint"),
    ("rfdetr", "an RF-DETR checkpoint"),
    ("damo", "a DAMO-YOLO checkpoint"),
    ("detectron2", "a Detectron2 checkpoint"),
    ("mmdet", "an MMDetection checkpoint"),
    ("mmyolo", "an MMYOLO checkpoint"),
    ("mmengine", "an MMDetection checkpoint"),
    ("mmcv", "an MMDetection checkpoint"),
    ("torchvision", "a torchvision model"),
    ("transformers", "a Transformers model"),
    ("timm", "a timm model"),
    ("pytorch_lightning", "a Lightning checkpoint"),
    ("lightning", "a Lightning checkpoint"),
    ("ultralytics", "a checkpoint of the Ultralytics package"),
)
_BY_CONFIG: tuple[tuple[str, str], ...] = (
    ("yolo26", "a YOLO26 checkpoint"),
    ("yolo12", "a YOLO12 checkpoint"),
    ("yolov12", "a YOLO12 checkpoint"),
    ("yolo13", "a YOLOv13 checkpoint"),
    ("yolov13", "a YOLOv13 checkpoint"),
    ("yolo11", "a YOLO11 checkpoint"),
    ("yolov10", "a YOLOv10 checkpoint"),
    ("yolov9", "a YOLOv9 checkpoint"),
    ("yolov8", "a YOLOv8 checkpoint"),
    ("yolov7", "a YOLOv7 checkpoint"),
    ("yolov6", "a YOLOv6 checkpoint"),
    ("yolov5", "a YOLOv5u checkpoint, but of another layout than yolov5nu.yaml to yolov5x6u.yaml"),
    ("yolov3", "a YOLOv3u checkpoint, with the anchor-free head of the Ultralytics package"),
)
"""Prefixes of the name of a layout in a checkpoint of the Ultralytics package."""
_BY_TENSOR: tuple[tuple[str, str], ...] = (
    (r"(backbone\.backbone\.(stem|dark\d)|head\.(cls|obj)_preds)\.", "YOLOX weights"),
    (r"(backbone\.ERBlock_\d|neck\.Rep_[pn]\d|detect\.(cls|reg)_preds)\.?", "YOLOv6 weights"),
    (r"(decoder\.(dec|enc)_score_head|decoder\.denoising_class_embed|enc_score_head)\.", "RT-DETR weights"),
    (r"(StructuredToParameterName@@|yolo_head\.|neck\.fpn_stages)", "PP-YOLOE weights"),
    (
        r"(roi_heads\.|rpn\.head\.|head\.(classification|regression)_head\.|backbone\.body\.)",
        "torchvision weights",
    ),
    (r"(bbox_head|rpn_head|roi_head)\.", "MMDetection weights"),
    (r"model\.\d+\.(dfl\.conv|one2one_cv\d)\.", "weights of the anchor-free head of YOLOv8 and later"),
    (r"model\.\d+\.(ia|im)\.\d+\.implicit", "YOLOv7 weights"),
    (r"(transformer\.(encoder|decoder)\.layers|class_embed)\.", "DETR weights"),
    (r"(layer1\.0\.conv1|features\.0\.0)\.weight", "weights of an image classifier"),
)
_TASKS = (
    ("Segment", "segmentation"),
    ("Pose", "pose"),
    ("OBB", "oriented boxes"),
    ("Classif", "classification"),
)
_ZIP_KINDS: tuple[tuple[str, str], ...] = (
    ("/constants.pkl", "a TorchScript program"),
    ("/code/", "a TorchScript program"),
    ("[Content_Types].xml", "an office document"),
    ("AndroidManifest.xml", "an Android package"),
    ("saved_model.pb", "a TensorFlow model in a zip archive"),
    ("mlpackage", "a Core ML model in a zip archive"),
)
_HEADS: tuple[tuple[bytes, int, str], ...] = (
    (b"ftrt", 0, "a TensorRT engine"),
    (b"TFL3", 4, "a TensorFlow Lite model"),
    (b"\x89HDF", 0, "an HDF5 file, which Keras writes"),
    (b"version https://git-lfs", 0, "a pointer of Git LFS, not the file itself (git lfs pull)"),
    (b"<!DOCTYPE", 0, "a web page, not the file that it links to"),
    (b"<!doctype", 0, "a web page, not the file that it links to"),
    (b"<html", 0, "a web page, not the file that it links to"),
    (b"<?xml", 0, "an XML file; an OpenVINO model, perhaps"),
    (b"\x1f\x8b", 0, "a gzip archive; unpack it first"),
    (b"7z\xbc\xaf", 0, "a 7z archive; unpack it first"),
    (b"Rar!", 0, "a RAR archive; unpack it first"),
    (b"\xfd7zXZ", 0, "an xz archive; unpack it first"),
    (b"ustar", 257, "a tar archive; unpack it first"),
    (b"GGUF", 0, "a GGUF model"),
)
"""Bytes, their offset, and the kind of the file."""


_NAMES: tuple[tuple[str, str], ...] = (
    (r"yolov5[nsmlx]6?u", "YOLOv5u"),
    (r"yolov3(-spp|-tiny)?u", "YOLOv3u, whose anchor-free head is not read here yet"),
    (r"yolov5[nsmlx]6?(?=-(seg|cls|pose|obb))", "YOLOv5"),
    (r"yolov8[smlx]-world(v2)?", "YOLO-World"),
    (r"yoloe-[\w-]+", "YOLOE"),
    (r"yolo[_-]?nas[\w-]*", "YOLO-NAS"),
    (r"yolox[\w-]*", "YOLOX"),
    (r"rt-?detr[\w-]*", "RT-DETR"),
    (r"rf-?detr[\w-]*", "RF-DETR"),
    (r"pp-?yolo[\w-]*", "PP-YOLOE"),
    (r"damo-?yolo[\w-]*", "DAMO-YOLO"),
    (r"fastsam[\w-]*", "FastSAM"),
    (r"(mobile_)?sam[23]?(\.\d)?_[btslh]\w*", "Segment Anything"),
    (r"yolo[_-]?v?(?:11|12|26)(?!\d)[\w-]*", "YOLO{}"),
    (r"yolo[_-]?v?(?:[346789]|10|13)(?!\d)[\w-]*", "YOLOv{}"),
)
"""Patterns of the names of published weights, and their family."""
_NAME_TASKS = (
    ("-seg", "segmentation"),
    ("-pose", "poses"),
    ("-obb", "oriented boxes"),
    ("-cls", "classification"),
)


def family_of_name(name: str) -> str | None:
    """Return the other family that a weights file has by its name, `YOLOv8 for segmentation`; None for other names."""
    stem = re.sub(r"\.(pt|pth|onnx|engine|weights)$", "", name.lower())
    for pattern, family in _NAMES:
        if re.fullmatch(rf"(?:{pattern})(?:-(?:seg|pose|obb|cls))?", stem):
            number = re.search(r"\d+", stem)
            named = family.format(number[0] if number else "")
            task = next((task for end, task in _NAME_TASKS if stem.endswith(end)), None)
            return f"{named} for {task}" if task else named
    return None


def foreign_kind(path: Path) -> str | None:
    """Return the kind of a file, `a YOLOv8 checkpoint`; None if not recognised. Reads a bounded part of the file."""
    try:
        with open_regular(path) as file:
            head = file.read(SCANNED)
            if not head.startswith(b"PK"):
                return _of_head(head) or _of_pickle(head)
            with open_zip(file, SCANNED) as archive:
                return _of_zip(archive)
    except Exception:  # a damaged or hostile file makes the standard library raise almost any exception
        return None


def family_of_tensors(names: Iterable[str]) -> str | None:
    """Return the family of a plain state dict by the names of its tensors; None if the names do not show it."""
    text = "\n".join(names)
    return next(
        (
            kind
            for pattern, kind in _BY_TENSOR
            if re.search(rf"(?m)^(module\.|model\.(\d+\.)?)?{pattern}", text)
        ),
        None,
    )


def _of_zip(archive: zipfile.ZipFile) -> str | None:
    names = archive.namelist()
    for part, kind in _ZIP_KINDS:
        if any(part in name for name in names):
            return kind
    pickled = next((name for name in names if name.endswith("data.pkl")), None)
    if pickled is None:
        return "a zip archive without a checkpoint in it"
    if archive.getinfo(pickled).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return None  # zipfile unpacks other methods without a bound
    with archive.open(pickled) as entry:
        return _of_pickle(entry.read(SCANNED))


def _of_head(head: bytes) -> str | None:
    for word, place, kind in _HEADS:
        if head[place : place + len(word)] == word:
            return kind
    length = int.from_bytes(head[:8], "little")
    if head[8:10] == b'{"' and 2 <= length < 100_000_000:
        return "a safetensors file"
    if head[4:6] == b'{"' and b"ftrt" in head:  # Ultralytics' engines begin with their metadata
        return "a TensorRT engine"
    # A protobuf whose field 1, ir_version, is a small number, and whose field 2 is a string: the producer.
    if head[:1] == b"\x08" and len(head) > 2 and head[1] < 32 and head[2] in b"\x12\x1a\x22\x2a\x3a":
        return "an ONNX model"
    return None


def _of_pickle(content: bytes) -> str | None:
    pairs = [(module.decode(), name.decode()) for module, name in _GLOBAL.findall(content)]
    texts = [text.decode("ascii", "replace") for text in _TEXT.findall(content)]
    modules = {module.partition(".")[0] for module, _ in pairs}
    modules |= {text.partition(".")[0] for text in texts if "." in text and b"\x93" in content}
    classes = {name for _, name in pairs} | {name.decode() for name in _STACK_GLOBAL.findall(content)}
    kind = _of_classes(modules, classes, content)
    return kind or family_of_tensors(texts)


def _of_classes(modules: Collection[str], classes: Collection[str], content: bytes) -> str | None:
    kind = next((kind for words, kind in _BY_CLASS if not set(words.split()).isdisjoint(classes)), None)
    if "ultralytics" in modules:
        layouts = [layout.decode() for layout in _YAML.findall(content)]
        named = (kind for start, kind in _BY_CONFIG if any(layout.startswith(start) for layout in layouts))
        kind = next(named, kind)
    kind = kind or next((kind for module, kind in _BY_MODULE if module in modules), None)
    task = next((task for word, task in _TASKS if any(name.startswith(word) for name in classes)), None)
    if kind is None and "models" in modules and task:
        kind = "a YOLOv5 checkpoint"
    return f"{kind} for {task}" if kind and task else kind
