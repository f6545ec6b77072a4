"""All converters of labels, by the name that a description's `convert:` step and `starling data convert` use."""

from __future__ import annotations

from collections.abc import Callable

from starling.data.fetch.convert import (
    Converted,
    convert_coco,
    convert_open_images,
    convert_visdrone,
    convert_voc,
    convert_wheat,
)
from starling.data.fetch.sidecars import convert_labelme, convert_voc_files

CONVERTERS: dict[str, Callable[..., int | Converted]] = {
    "voc": convert_voc,
    "voc_files": convert_voc_files,
    "labelme": convert_labelme,
    "visdrone": convert_visdrone,
    "wheat": convert_wheat,
    "coco": convert_coco,
    "openimages": convert_open_images,
}
