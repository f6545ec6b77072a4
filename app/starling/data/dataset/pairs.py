"""Find the label file of an image, and the label files in a dataset's folders that belong to no image."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from starling.core.files.kinds import IMAGE_SUFFIXES, UNREAD_IMAGE_SUFFIXES, is_hidden, suffix_of
from starling.core.paths import encodings
from starling.data.dataset.findings import Finding
from starling.data.dataset.labels import Keypoints, LabelFile, label_path, label_path_beside, read_labels

_TEXT = ".txt"


def read_pair(image: Path, nc: int, keypoints: Keypoints | None) -> LabelFile:
    """Return the labels of an image: in the folder `labels` of its `images`, or else beside the image itself.

    A label file whose name differs only in the Unicode encoding of accents belongs to the image too.
    """
    places = dict.fromkeys((label_path(image), label_path_beside(image)))
    names = encodings(label_path(image).name)
    for path in dict.fromkeys(place.with_name(name) for place in places for name in names):
        found = read_labels(path, nc, keypoints)
        if not found.missing:
            break
    return found


def unlabelled(images: Iterable[Path]) -> Iterator[Finding]:
    """Yield a finding for each image without a label file."""
    for image in images:
        remedy = f"write {label_path(image)}, empty if nothing is in the image"
        yield Finding(str(image), None, "no label file, so taken for background", remedy)


def without_partner(images: Iterable[Path]) -> Iterator[Finding]:
    """Yield a finding for each unread label file in the label folders of a split's images, with the reason.

    A split may list only a part of a folder; therefore the search for the image looks in the folder. Text files beside
    the images may be anything (lists, licences): they are reported only if the image has two label files.
    """
    folders: dict[Path, set[Path]] = {}
    for image in images:
        folders.setdefault(label_path(image).parent, set()).add(image.parent)
    names = {
        folder: _names(folder) for folder in {*folders, *(one for some in folders.values() for one in some)}
    }
    for labels, places in sorted(folders.items()):
        if labels in places:
            continue
        stems = {_stem(name): name for place in places for name in names[place] if _is_image(name)}
        read = set()
        for name in names[labels]:
            stem, suffix = _stem(name), os.path.splitext(name)[1]
            if suffix == _TEXT and stem in stems and not _is_unread(stems[stem]):
                read.add(stem)
            elif suffix.lower() == _TEXT and name != "classes.txt":  # annotation programs write classes.txt
                yield _not_read(labels, name, stems.get(stem))
        for place in sorted(places):
            for name in names[place]:
                if name.endswith(_TEXT) and _stem(name) in read:
                    problem = f"lies beside the image and is not read: {labels / name} is"
                    yield Finding(str(place / name), None, problem, "remove one of the two")


def _stem(name: str) -> str:
    """Return a name without suffix, with accents in one Unicode encoding (NFC)."""
    return unicodedata.normalize("NFC", os.path.splitext(name)[0])


def _not_read(labels: Path, name: str, image: str | None) -> Finding:
    if image is None:
        problem, remedy = "a label file without an image, not used", "add the image or remove the file"
    elif _is_unread(image):
        problem, remedy = (
            f"not used: {image} is of a kind that is not read",
            "convert the image to JPEG or PNG",
        )
    else:
        problem, remedy = "not read: its suffix is not .txt", f"rename it to {os.path.splitext(name)[0]}.txt"
    return Finding(str(labels / name), None, problem, remedy)


def _is_image(name: str) -> bool:
    return suffix_of(name) in IMAGE_SUFFIXES | UNREAD_IMAGE_SUFFIXES


def _is_unread(name: str) -> bool:
    return suffix_of(name) in UNREAD_IMAGE_SUFFIXES


def _names(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not is_hidden(name))
    except OSError:
        return []
