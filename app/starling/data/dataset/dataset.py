"""Read a dataset's YAML description and return checked pairs of image and labels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from starling.config.class_names import names_by_number
from starling.config.shipped import SHIPPED
from starling.config.yaml_reader import read_yaml
from starling.core.cgroups import container_cpu_count
from starling.core.dataset import OWN, SPLITS, BadDescription, NamedPlaces, find_entry, start_folder
from starling.core.errors import ConfigError, DataError, suggest
from starling.core.files.refusals import readable
from starling.data.dataset.findings import REPORT, Finding
from starling.data.dataset.image_cost import ImageHeader
from starling.data.dataset.image_lists import FoundImages, find_images, locate
from starling.data.dataset.images import UnusableImageError, read_header
from starling.data.dataset.labels import Keypoints, LabelFile, Polygon, doubtful_polygons, read_keypoints
from starling.data.dataset.left_out import LeftOut
from starling.data.dataset.pairs import read_pair, unlabelled, without_partner
from starling.outputs.names import distinct

_KNOWN_KEYS = frozenset((*SPLITS, "path", "nc", "names", "download"))
_TOLERATED_KEYS = frozenset(
    (
        *(
            "author",
            "channels",
            "date",
            "description",
            "docs",
            "flip_idx",
            "kpt_names",
            "kpt_shape",
            "license",
        ),
        *("minival", "roboflow", "skeleton", "task", "url", "version"),
    )
)
"""Keys that exporters write and that have no effect. starling.data.fetch.acquire reads `download`, on request only."""
BACKGROUND = "background"
"""Name of the row and column of a confusion matrix for detections and labels without a match."""
_MAX_CLASSES = 100_000

Progress = Callable[[int, int], None]
"""Called with (number of checked images, number of all images)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetDescription:
    """The content of a dataset's YAML, with resolved paths."""

    path_yaml: Path
    root: Path
    """Folder that relative paths of splits start from."""
    splits: Mapping[str, tuple[Path, ...]]
    """Split name -> folders of images, `.txt` lists of images, or single images."""
    names: tuple[str, ...]
    """Class names by class number; one name under single_cls."""
    nc_in_labels: int
    """Number of classes that label files may name; larger than `nc` only under single_cls."""
    keypoints: Keypoints | None = None
    """Keypoints of every label row; None if the description declares no keypoints."""

    @property
    def nc(self) -> int:
        """Number of classes to learn."""
        return len(self.names)

    @property
    def single_cls(self) -> bool:
        """Whether all classes of the label files count as one."""
        return self.nc_in_labels != self.nc

    @classmethod
    @readable(DataError)
    def from_yaml(cls, path: Path, single_cls: bool = False) -> Self:
        """Read and check a description.

        Raises UsageError for an error in the file, DataError if the data that the file names does not exist.
        """
        path = Path(os.path.abspath(path))  # not resolved: relative paths start where the user put the file
        mapping = read_yaml(path, unreadable=DataError)
        for key in mapping:
            if key not in _KNOWN_KEYS | _TOLERATED_KEYS:
                raise ConfigError(str(path), key, f"unknown key{suggest(key, _KNOWN_KEYS)}; remove or fix it")
        places = _named_places(path, mapping)
        names = _class_names(path, mapping)
        root = _find_root(places, fetchable=isinstance(mapping.get("download"), list))
        if mapping.get("names") is None:
            names = _names_beside(root / path.name, names)
        return cls(
            path_yaml=path,
            root=root,
            splits={split: tuple(locate(root, e) for e in some) for split, some in places.entries.items()},
            names=("item",) if single_cls and len(names) > 1 else names,
            nc_in_labels=len(names),
            keypoints=read_keypoints(path, mapping),
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dataset:
    """The usable images of one split with their labels, in a fixed order.

    Image headers and labels are read anew for each run: threads take about 0.1 ms per image, less than checking that a
    label cache is fresh would take, and training never uses an outdated version of an edited label file.
    """

    images: list[Path]
    labels: list[np.ndarray[Any, Any]]
    """[n,5] float32 for each image: class, x and y of the centre, width, height, 0 to 1."""
    shapes_hw: np.ndarray[Any, Any]
    """[N,2] int64: upright height and width in pixels."""
    names: tuple[str, ...]
    polygons: list[tuple[Polygon | None, ...]] = field(default_factory=list)
    """For each image its polygons, parallel to its label rows (None: the row is a box), or an empty tuple without any
    polygon; an empty list if no image of the split has a polygon."""
    problems: list[Finding]
    """Left-out images with reasons; `skipped` is the number of left-out images."""
    notes: list[Finding]
    """Label rows that are left out without harm."""
    unread: list[Finding] = field(default_factory=list)
    """Images in formats that are not read, one finding for all of them."""
    unlabelled: list[Finding] = field(default_factory=list)
    """Images without a label file; such images are background."""
    unpaired: list[Finding] = field(default_factory=list)
    """Label files that are not read, for example label files without an image."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """Everything that is left out, counted by reason."""
    clipped: int = 0
    """Number of label rows with a value slightly outside [0, 1]."""
    skipped: int
    digest: str
    """Hex SHA-256 of names, labels, and the images' relative paths, sizes in pixels and in bytes."""
    stamps: np.ndarray[Any, Any]
    """[N,2] int64: size in bytes and time of change of each image file; part of the key of data derived from pixels."""

    @property
    def nc(self) -> int:
        """Number of classes."""
        return len(self.names)

    @property
    def distinct_names(self) -> tuple[str, ...]:
        """Class names for display and counting: classes with equal names get their numbers appended."""
        return distinct(self.names, reserved=(BACKGROUND,))

    @property
    def boxes(self) -> int:
        """Number of label rows."""
        return sum(map(len, self.labels))

    @property
    def findings(self) -> list[Finding]:
        """All problems of the split, sorted by file."""
        every = (*self.problems, *self.notes, *self.unread, *self.unlabelled, *self.unpaired)
        return sorted(every, key=lambda f: (f.file, f.line or 0))

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    @readable(DataError)
    def load(
        cls,
        description: DatasetDescription,
        split: str,
        *,
        strict: bool = False,
        progress: Progress | bool | None = None,
    ) -> Self:
        """Find the images of `split`, check each header and label file, keep the usable pairs.

        Unusable images are left out and listed in `problems`; with `strict` they are a DataError instead.
        `progress` may be a callable; a bool (whether the caller wants to print) is ignored.
        Raises DataError also if the split does not exist or has no usable image.
        """
        if split not in description.splits:
            given = ", ".join(description.splits)
            raise DataError(
                f"{description.path_yaml}: has no `{split}:`; add it, or use a split it has ({given})"
            )
        source = f"{description.path_yaml}: {split}"
        found = find_images(description.splits[split], description.root, source)
        report = progress if callable(progress) else None
        scanned = list(_scan(found.images, description, report))
        problems = [*found.absent, *(problem for item in scanned for problem in item.problems)]
        if problems and strict:
            raise DataError(_many(f"{split}: unusable images under --strict", problems))
        usable = [item for item in scanned if item.header is not None and not item.problems]
        if not usable:
            where = ", ".join(str(entry) for entry in description.splits[split])
            reason = _many("none is usable", problems) if problems else "no images there; check the path"
            raise DataError("\n  ".join([f"{source}: {where}: {reason}", *found.left_out.lines()]))
        return cls._assemble(description, usable, problems, scanned, found)

    @classmethod
    def _assemble(
        cls,
        description: DatasetDescription,
        usable: list[_Scanned],
        problems: list[Finding],
        scanned: list[_Scanned],
        found: FoundImages,
    ) -> Self:
        files = [item.label_file for item in scanned]
        unread = found.left_out.findings()
        unpaired = list(without_partner(item.path for item in scanned))
        skipped = len(scanned) - len(usable) + found.absent_count
        labels = [item.label_file.rows for item in usable]
        if description.single_cls:
            for rows in labels:
                rows[:, 0] = 0
        headers = [item.header for item in usable if item.header is not None]
        return cls(
            images=[item.path for item in usable],
            labels=labels,
            shapes_hw=np.array([header.hw for header in headers], np.int64),
            names=description.names,
            problems=problems,
            polygons=[item.label_file.polygons for item in usable]
            if any(item.label_file.polygons for item in usable)
            else [],
            notes=[
                *found.notes,
                *doubtful_polygons(description.path_yaml, (item.label_file for item in usable)),
                *(note for file in files for note in file.notes),
            ],
            unread=unread,
            unlabelled=list(unlabelled(item.path for item in usable if item.label_file.missing)),
            unpaired=unpaired,
            skipped=skipped,
            clipped=sum(file.clipped for file in files),
            left_out=_account(found.left_out, skipped, problems, files, unpaired),
            digest=_digest(description, usable),
            stamps=np.array([(header.file_size, header.changed_ns) for header in headers], np.int64),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scanned:
    path: Path
    header: ImageHeader | None
    label_file: LabelFile
    problems: tuple[Finding, ...]


def _named_places(path: Path, mapping: Mapping[str, Any]) -> NamedPlaces:
    try:
        return NamedPlaces.of(path, mapping)
    except BadDescription as error:
        field = str(path) if error.key is None else f"{path}: {error.key}"
        raise ConfigError(field, error.value, error.problem) from None


def read_class_names(path: Path) -> tuple[str, ...]:
    """Return the class names in a dataset's YAML; the images need not exist."""
    return _class_names(path, read_yaml(path))


def _class_names(path: Path, mapping: Mapping[str, Any]) -> tuple[str, ...]:
    names, nc = mapping.get("names"), mapping.get("nc")
    if nc is not None and (isinstance(nc, bool) or not isinstance(nc, int) or not 1 <= nc <= _MAX_CLASSES):
        raise ConfigError(f"{path}: nc", nc, "must be the number of classes, 1 or more")
    if names is None:
        if nc is None:
            raise ConfigError(f"{path}: names", None, "give the class names as a list")
        return tuple(f"class{number}" for number in range(nc))
    if isinstance(names, dict):
        keys = list(names)[:10]
        names = names_by_number(names)
        if names is None:
            raise ConfigError(f"{path}: names", keys, "the keys must be 0, 1, 2, ... without gaps")
    if not isinstance(names, list) or not names or any(isinstance(n, list | dict | None) for n in names):
        raise ConfigError(f"{path}: names", names, "must be a list of names, or number: name lines")
    if nc is not None and nc != len(names):
        raise ConfigError(f"{path}: nc", nc, f"but there are {len(names)} names; make them agree")
    return tuple(str(name) for name in names)


def _names_beside(own: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the class names of the description in the folder of fetched data; `names` without a description."""
    if not own.is_file():
        return names
    found = read_class_names(own)
    if len(found) != len(names):
        raise ConfigError(f"{own}: names", len(found), f"but `nc:` is {len(names)}; make them agree")
    return found


def _find_root(places: NamedPlaces, *, fetchable: bool) -> Path:
    """Return the folder that relative paths of splits start from."""
    start = start_folder()
    root = places.find_root(OWN, start)
    if root is not None:
        return root
    path_yaml, first_entry = places.yaml_path, next(iter(places.entries.values()))[0]
    tried = ", ".join(map(str, places.roots(OWN, start)))
    name = path_yaml.name if path_yaml.is_relative_to(SHIPPED) else path_yaml
    lies_beside = find_entry(path_yaml.parent, first_entry, OWN) is not None
    beside = f" ({first_entry} lies beside the YAML: write `path: .`)" if lies_beside else ""
    fetch = f"; or fetch it: starling data download {name} (or --download)" if fetchable else ""
    raise DataError(
        f"{path_yaml}: the dataset is not there (tried {tried}); put it there or fix `path:`{beside}{fetch}"
    )


def _scan(
    paths: list[Path], description: DatasetDescription, progress: Progress | None
) -> Iterator[_Scanned]:
    """Check headers and labels in threads, and yield the results in order: opening the files takes most of the time."""

    def scan_one(path: Path) -> _Scanned:
        label_file = read_pair(path, description.nc_in_labels, description.keypoints)
        try:
            header = read_header(path)
        except UnusableImageError as error:
            problem = Finding(str(path), None, error.problem, error.remedy)
            return _Scanned(
                path=path, header=None, label_file=label_file, problems=(problem, *label_file.problems)
            )
        return _Scanned(path=path, header=header, label_file=label_file, problems=label_file.problems)

    with ThreadPoolExecutor(min(container_cpu_count() * 2, 16), "scan") as pool:
        for done, item in enumerate(pool.map(scan_one, paths, chunksize=64), start=1):
            if progress is not None and (done % 64 == 0 or done == len(paths)):
                progress(done, len(paths))
            yield item


def _account(
    account: LeftOut,
    skipped: int,
    problems: list[Finding],
    files: list[LabelFile],
    unpaired: list[Finding],
) -> LeftOut:
    """Return `account` with the skipped images, left-out label rows and unread label files added."""
    named = f"{REPORT} of a run names each"
    if problems:
        account.add(
            "images that cannot be used, or whose labels cannot", problems[0].file, named, count=skipped
        )
    rows = sum(file.left_out for file in files)
    first = next((note.file for file in files if file.left_out for note in file.notes), "")
    account.add("label rows that repeat another or have no size", first, named, count=rows)
    if unpaired:
        account.add("label files that are not read", unpaired[0].file, named, count=len(unpaired))
    return account


def _digest(description: DatasetDescription, usable: Iterable[_Scanned]) -> str:
    digest = hashlib.sha256()
    for name in description.names:
        digest.update(name.encode() + b"\0")
    for item in usable:
        assert item.header is not None
        relative = os.path.relpath(item.path, description.root)
        height, width = item.header.hw
        rows = item.label_file.rows
        digest.update(f"\n{relative}\0{height}\0{width}\0{item.header.file_size}\0{len(rows)}\0".encode())
        digest.update(np.ascontiguousarray(rows).tobytes())
        for polygon in item.label_file.polygons:
            digest.update(b"-" if polygon is None else polygon.tobytes())
    return digest.hexdigest()


def _many(head: str, problems: list[Finding], shown: int = 10) -> str:
    more = [f"and {len(problems) - shown} more"] if len(problems) > shown else []
    return "\n  ".join([f"{head} ({len(problems)}):", *map(str, problems[:shown]), *more])
