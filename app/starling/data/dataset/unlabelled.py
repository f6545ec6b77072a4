"""Explain why a split has no box: where labels were looked for, what lies there instead, and the remedy."""

from __future__ import annotations

import os
import re
import shlex
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from starling.core.errors import DataError
from starling.core.files.kinds import IMAGE_SUFFIXES, UNREAD_IMAGE_SUFFIXES, is_hidden, suffix_of
from starling.data.dataset.dataset import Dataset, DatasetDescription
from starling.data.dataset.labels import label_path
from starling.data.fetch.annotation_files import kind_of_json, kind_of_xml, table_columns

_MOST_ENTRIES = 200_000
"""Maximum number of files looked at below a dataset's folder in the search for its labels."""
_MOST_CLUES = 6
_MOST_SNIFFED = 20
"""Maximum number of files per folder that are opened to determine their kind."""
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
_HASH = re.compile(r"^[0-9a-fA-F]{8}-|_(?:jpg|jpeg|png)\.rf\.[0-9a-fA-F]+$")
"""Prefixes and suffixes that annotation services add to a name."""


@dataclass(slots=True)
class _Scene:
    """The files around the images of a split."""

    description: DatasetDescription
    images: list[Path]
    files: dict[Path, list[str]] = field(default_factory=dict)
    """Folder -> names of its files, without images and hidden files."""

    @property
    def wanted(self) -> list[Path]:
        """Return the folders where labels are looked for."""
        return sorted({label_path(image).parent for image in self.images})

    def command(self, name: str, source: Path, images: Path | None) -> str:
        """Return the command that converts annotations; `source` and `images` are written relative to one folder."""
        folder = self.description.root
        if not source.is_relative_to(folder) or not (images or folder).is_relative_to(folder):
            folder = Path(os.path.commonpath([source.parent, images or folder]))
        words = [
            "starling",
            "data",
            "convert",
            str(self.description.path_yaml),
            str(folder),
            name,
        ]
        words.append(f"source={source.relative_to(folder)}")
        if images is not None:
            words.append(f"images={images.relative_to(folder)}")
        return shlex.join(words)


def explain_no_box(description: DatasetDescription, split: str, data: Dataset, purpose: str = "learn") -> str:
    """Explain, in several lines, why a split has no box; `purpose` is to `learn` from the split, or to `score` it."""
    scene = _Scene(description, data.images)
    _look_around(scene)
    places = ", ".join(map(str, scene.wanted[:3])) + (" and others" if len(scene.wanted) > 3 else "")
    example = label_path(data.images[0])
    head = f"{description.path_yaml}: {split}: none of its {len(data)} images has a box, so there is nothing to {purpose}"
    looked = f"labels were looked for in {places} ({example.name} for {data.images[0].name}), and beside the images"
    clues = list(dict.fromkeys(clue for find in _CLUES for clue in find(scene)))
    empty = len(data) - len(data.unlabelled)
    if empty:
        rows = f"; {data.notes[0]}" if data.notes else ""
        clues.insert(0, f"{empty} label files are there, and no row of theirs is a box{rows}")
    if not clues:
        clues = [
            f"nothing there looks like labels; write {example} with a row `class x y width height` a box"
        ]
    return "\n  ".join([f"{head}: {looked}", *clues[:_MOST_CLUES]])


def _look_around(scene: _Scene) -> None:
    """List the files of the dataset's folder, and of folders near its images, breadth first."""
    roots = [scene.description.root]
    for folder in sorted({image.parent for image in scene.images}):
        near = (folder, folder.parent) if folder.name != "images" else (folder.parent,)
        roots += [
            one for one in near if not one.is_relative_to(scene.description.root) and len(one.parts) > 2
        ]
    seen, waiting, looked_at = set(roots), list(dict.fromkeys(roots)), 0
    while waiting and looked_at < _MOST_ENTRIES:
        folder = waiting.pop(0)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    looked_at += 1
                    if is_hidden(entry.name) or looked_at > _MOST_ENTRIES:
                        continue
                    path = Path(entry.path)
                    if entry.is_dir(follow_symlinks=False):
                        if path not in seen:
                            seen.add(path)
                            waiting.append(path)
                    elif suffix_of(entry.name) not in IMAGE_SUFFIXES | UNREAD_IMAGE_SUFFIXES:
                        scene.files.setdefault(folder, []).append(entry.name)
        except OSError:
            continue
    for names in scene.files.values():
        names.sort()


def _text_files(scene: _Scene) -> Iterator[str]:
    """Yield hints at label files that have the names of images but lie in another folder or have another suffix."""
    wanted = {image.stem: label_path(image) for image in scene.images}
    for folder, names in sorted(scene.files.items()):
        by_suffix: dict[str, list[str]] = defaultdict(list)
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() == ".txt" and stem in wanted:
                by_suffix[suffix].append(stem)
        for suffix, stems in by_suffix.items():
            target = wanted[stems[0]].parent
            files = f"{folder}: {len(stems)} files {stems[0]}{suffix}, … have the names of images"
            if suffix != ".txt":
                yield f"{files} and do not end in .txt; rename them: {_rename(folder, suffix)}"
            elif folder != target:
                yield f"{files}; they belong in {target}: {_move(folder, target)}"


def _rename(folder: Path, suffix: str) -> str:
    return f'(cd {shlex.quote(str(folder))} && for f in *{suffix}; do mv -n "$f" "${{f%{suffix}}}.txt"; done)'


def _move(folder: Path, target: Path) -> str:
    source, there = shlex.quote(str(folder)), shlex.quote(str(target))
    if target.exists() or target.parent != folder.parent:
        return f"mkdir -p {there} && cp -n {source}/*.txt {there}/"
    return f"mv -n {source} {there}"


def _other_names(scene: _Scene) -> Iterator[str]:
    """Yield hints at label files whose names differ from image names by encoding, a hash, case or an image suffix."""
    exact = {image.stem for image in scene.images}
    plain = {_plain(image.stem): image for image in scene.images}
    for folder, names in sorted(scene.files.items()):
        pairs = []
        for name in names:
            stem, suffix = os.path.splitext(name)
            if (
                suffix.lower() == ".txt"
                and stem not in exact
                and (image := plain.get(_plain(stem))) is not None
            ):
                pairs.append((name, image))
        if pairs:
            name, image = pairs[0]
            yield (
                f"{folder}: {len(pairs)} label files have nearly the names of images: {name} for {image.name}; "
                f"give both the same: mv -n {shlex.quote(str(folder / name))} "
                f"{shlex.quote(str(folder / f'{image.stem}.txt'))}, and so on"
            )


def _plain(stem: str) -> str:
    """Return a name without the changes that exporters make."""
    name = unicodedata.normalize("NFKC", unquote(stem))
    while suffix_of(name) in IMAGE_SUFFIXES:
        name = os.path.splitext(name)[0]
    return re.sub(r"[\s_+]+", "_", _HASH.sub("", name)).casefold()


def _xml_files(scene: _Scene) -> Iterator[str]:
    for folder, names in sorted(scene.files.items()):
        files = [name for name in names if suffix_of(name) == ".xml"]
        kinds = {kind_of_xml(folder / name) for name in files[:_MOST_SNIFFED]}
        if "voc" in kinds:
            images = _images_of(scene, files)
            command = scene.command("voc_files", folder, images)
            yield f"{folder}: {len(files)} .xml files of Pascal VOC; convert them: {command}"
        if "cvat" in kinds:
            yield f"{folder}: {files[0]} is CVAT's own XML; export the task as YOLO 1.1 or COCO 1.0 from CVAT"


def _json_files(scene: _Scene) -> Iterator[str]:
    for folder, names in sorted(scene.files.items()):
        files = [name for name in names if suffix_of(name) == ".json"]
        kinds = [(name, kind_of_json(folder / name)) for name in files[:_MOST_SNIFFED]]
        for name, kind in kinds:
            if kind == "coco":
                command = scene.command("coco", folder / name, _images_of(scene, []))
                yield f"{folder / name}: COCO annotations; convert them: {command}"
            elif kind == "other":
                yield (
                    f"{folder / name}: annotations in a JSON format that is not read; export them as YOLO, COCO or "
                    "Pascal VOC from the program that wrote them"
                )
        if any(kind == "labelme" for _, kind in kinds):
            command = scene.command("labelme", folder, _images_of(scene, files))
            yield f"{folder}: {len(files)} .json files of labelme; convert them: {command}"


def _tables(scene: _Scene) -> Iterator[str]:
    for folder, names in sorted(scene.files.items()):
        for name in [name for name in names if suffix_of(name) in (".csv", ".tsv")][:_MOST_SNIFFED]:
            columns = table_columns(folder / name)
            if not columns:
                continue
            if {"image_id", "bbox"} <= columns or {"image_name", "BoxesString"} <= columns:
                command = scene.command("wheat", folder / name, _images_of(scene, []))
                yield f"{folder / name}: a table of boxes as Global Wheat has it; convert it: {command}"
            elif {"ImageID", "LabelName", "XMin"} <= columns:
                command = (
                    f"{scene.command('openimages', folder / name, _images_of(scene, []))} classes=CLASSES.csv"
                )
                yield f"{folder / name}: a table of boxes of Open Images; convert it: {command}"
            else:
                yield (
                    f"{folder / name}: a table with the columns {', '.join(sorted(columns)[:8])}; no converter reads it: "
                    "write a .txt file an image from it, a row `class x y width height` a box, divided by the image's size"
                )


def _archives(scene: _Scene) -> Iterator[str]:
    for folder, names in sorted(scene.files.items()):
        for name in names:
            if suffix_of(name) in _ARCHIVES and re.search(
                "label|annot|yolo|bbox|coco|voc", name, re.IGNORECASE
            ):
                yield f"{folder / name}: an archive that may hold labels; unpack it there"


def _images_of(scene: _Scene, annotations: list[str]) -> Path:
    """Return the folder with images of the annotations' names; otherwise the folder of the first image."""
    stems = {os.path.splitext(name)[0] for name in annotations}
    for image in scene.images:
        if image.stem in stems:
            return image.parent
    return scene.images[0].parent


_CLUES = (_text_files, _other_names, _xml_files, _json_files, _tables, _archives)


def check_boxes(description: DatasetDescription, split: str, data: Dataset, purpose: str = "learn") -> None:
    """Raise DataError, with hints where labels may be, if a split has no box."""
    if not data.boxes:
        raise DataError(explain_no_box(description, split, data, purpose))
