"""Which label file belongs to an image, and what lies in folders of images and labels without a partner."""

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

    A label file is the image's too where its name differs in the encoding of accents only.
    """
    places = dict.fromkeys((label_path(image), label_path_beside(image)))
    names = encodings(label_path(image).name)
    for path in dict.fromkeys(place.with_name(name) for place in places for name in names):
        found = read_labels(path, nc, keypoints)
        if not found.missing:
            break
    return found


def unlabelled(images: Iterable[Path]) -> Iterator[Finding]:
    """Yield what to say of images that have no label file."""
    for image in images:
        remedy = f"write {label_path(image)}, empty if nothing is in the image"
        yield Finding(str(image), None, "no label file, so taken for background", remedy)


def without_partner(images: Iterable[Path]) -> Iterator[Finding]:
    """Yield the label files beside those of a split's images that are not read, and why.

    A split may list a part of a folder, so it is the folder that is asked for the image. Text files that lie among the
    images themselves may be anything (lists, licences), and are judged only where an image has two label files.
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
            elif suffix.lower() == _TEXT and name != "classes.txt":  # which annotators write
                yield _not_read(labels, name, stems.get(stem))
        for place in sorted(places):
            for name in names[place]:
                if name.endswith(_TEXT) and _stem(name) in read:
                    problem = f"lies beside the image and is not read: {labels / name} is"
                    yield Finding(str(place / name), None, problem, "remove one of the two")


def _stem(name: str) -> str:
    """Return a name without suffix, in one of the encodings that it may have."""
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
