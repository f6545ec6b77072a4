"""Fetch published datasets and weights by name. No other command downloads anything unless asked to.

starling data download coco128.yaml          a dataset, into ../datasets/coco128
starling data download VOC.yaml --into DIR   into DIR/VOC
starling data download yolov5s.pt            weights, into ~/.cache/starling/weights
starling data version DIR --name cells       a new version of a ClearML dataset, with the content of DIR
starling data convert Objects365.yaml DIR    add label files to a dataset that is already in DIR
starling data convert my.yaml DIR coco source=boxes.json images=images/train    the same, with a given converter
starling data cache                          list the files of decoded images, below the runs folder
starling data cache --remove                 remove the files that no training uses
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from starling.cli.command import run_command
from starling.config.shipped import DATASETS_FOLDER, find_config
from starling.core.errors import DataError, UsageError
from starling.core.paths import real_path
from starling.core.settings.parser import PathParser
from starling.progress import Progress, on_console

if TYPE_CHECKING:
    from starling.data.fetch.acquire import Convert

# Each command imports what it fetches and converts with: `--help` does not need these modules.


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `starling data`."""
    parser = PathParser(
        prog="starling data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    download = commands.add_parser("download", help="fetch datasets and weights by name")
    download.add_argument("names", nargs="+", metavar="NAME", help="coco128.yaml, a path, or yolov5s.pt")
    download.add_argument(
        "--into", type=Path, default=DATASETS_FOLDER, metavar="DIR", help="folder of datasets [%(default)s]"
    )
    version = commands.add_parser(
        "version", help="make a version of a ClearML dataset: create, sync, upload, close"
    )
    version.add_argument(
        "folder", type=Path, nargs="?", default=Path(), help="folder of the data, with its YAML [.]"
    )
    version.add_argument("--project", default="datasets", help="ClearML project [%(default)s]")
    version.add_argument("--name", help="name of the dataset [the folder's]")
    version.add_argument(
        "--parent", default="", metavar="ID", help="the previous version: only changes are uploaded"
    )
    version.add_argument("--version", default="", help="number of the version [the next one]")
    version.add_argument("--json", action="store_true", help="print one JSON object")
    convert = commands.add_parser("convert", help="run a description's `convert:` steps on existing data")
    convert.add_argument("name", help="dataset YAML, shipped name or path")
    convert.add_argument("folder", type=Path, help="the dataset's folder")
    convert.add_argument(
        "step",
        nargs="*",
        metavar="STEP",
        help="a converter and its arguments, `coco source=boxes.json images=images/train` [the description's steps]",
    )
    cache = commands.add_parser("cache", help="list or remove files of decoded images")
    cache.add_argument(
        "folder", nargs="?", type=Path, metavar="DIR", help="folder of the files [.cache in the runs folder]"
    )
    cache.add_argument("--remove", action="store_true", help="remove the files that no process uses")
    cache.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


_Body = Callable[[argparse.Namespace], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    given = build_parser().parse_args(arguments)
    bodies: dict[str, _Body] = {
        "download": _download,
        "convert": _convert,
        "cache": _cache,
        "version": _version,
    }
    return run_command(lambda: given, bodies[given.command], debug=lambda given: False)


def _download(given: argparse.Namespace) -> None:
    from starling.data.fetch.acquire import acquire
    from starling.model.official import another_family, official_name, official_weights

    with on_console(Progress()) as progress:
        for name in given.names:
            weights = official_name(name)
            if weights is not None:
                progress.say(str(official_weights(weights, progress.show)))
            elif name.endswith(".pt") and (other := another_family(name)):
                raise UsageError(f"{name}: {other}")
            else:
                acquire(find_config("datasets", name), into=given.into, show=progress.show)


def _convert(given: argparse.Namespace) -> None:
    from starling.config.yaml_reader import read_yaml
    from starling.data.fetch.acquire import (
        Convert,
        Names,
        class_names,
        read_steps,
        run_steps,
        write_description,
    )

    path = find_config("datasets", given.name)
    steps: list[Convert | Names]
    if given.step:
        steps = [_step_of_words(given.step)]
    else:
        steps = [step for step in read_steps(path) if isinstance(step, Convert | Names)]
    if not any(isinstance(step, Convert) for step in steps):
        raise DataError(
            f"{path}: has no `convert:` steps; name a converter and its arguments after the folder"
        )
    if not given.folder.is_dir():
        raise DataError(f"{given.folder}: no such folder; give the one that holds the dataset")
    mapping = read_yaml(path)
    known = class_names(path, mapping, steps)
    with on_console(Progress()) as progress:
        names = run_steps(steps, given.folder.absolute(), known, archives=given.folder)
        own = given.folder / path.name
        # The names came with the data; a file of the user's stays as it is.
        if not known and not own.exists():
            write_description(given.folder, path, mapping, names)
            progress.say(f"{own}: the description with its class names; give it to --data")


def _step_of_words(words: Sequence[str]) -> Convert:
    """Return the step described by `NAME key=value ...`."""
    from starling.data.fetch.acquire import convert_step

    pairs = [word.partition("=") for word in words[1:]]
    return convert_step("convert", {"convert": words[0], **{key: value for key, _, value in pairs}})


def _version(given: argparse.Namespace) -> None:
    from starling.data.fetch.find import check_folder
    from starling.tracking.clearml.dataset import DatasetServer

    folder = given.folder.absolute()
    with on_console(Progress(sys.stderr if given.json else sys.stdout)) as progress:
        description = check_folder(folder)
        progress.say(f"{description.path_yaml.name} is sound")
        made = DatasetServer(f"{folder}: no version was made").upload(
            folder,
            project=given.project,
            name=given.name or real_path(given.folder).name,
            version=given.version,
            parent=given.parent,
        )
        if given.json:
            print(json.dumps({**asdict(made), "data": made.url}))
            return
        progress.say(
            f"{made.project}/{made.name} {made.version}: {made.added} added, {made.modified} changed, "
            f"{made.removed} removed"
        )
        progress.say(f"train on it: python train.py --data {made.url}")


def _cache(given: argparse.Namespace) -> None:
    from starling.data.cache.store import show_cache

    show_cache(given.folder, remove=given.remove, as_json=given.json)
