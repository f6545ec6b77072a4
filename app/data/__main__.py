"""Get what is published, by name; nothing else in this project fetches anything unasked.

python -m app.data download coco128.yaml          a dataset, into ../datasets/coco128
python -m app.data download VOC.yaml --into DIR   into DIR/VOC
python -m app.data download yolov5s.pt            weights, into ~/.cache/starling/weights
python -m app.data convert Objects365.yaml DIR    add label files to a dataset that you have in DIR
python -m app.data cache                          list the files of decoded pictures, below the runs folder
python -m app.data cache --remove                 remove those that no training uses
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app.command import run_command
from app.config.shipped import find_config
from app.config.yaml_reader import read_yaml
from app.data.acquire import DATASETS_FOLDER, Convert, acquire, class_names, read_steps, run_steps
from app.data.pixel_folder import CACHE_FOLDER, KeptFile, kept_files, remove_idle
from app.engine.official import official_name, official_weights
from app.engine.progress import Progress
from app.errors import DataError
from app.outputs.run_dir import runs_root


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m app.data`."""
    parser = argparse.ArgumentParser(
        prog="python -m app.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    download = commands.add_parser("download", help="fetch datasets and weights by name")
    download.add_argument("names", nargs="+", metavar="NAME", help="coco128.yaml, a path, or yolov5s.pt")
    download.add_argument(
        "--into", type=Path, default=DATASETS_FOLDER, metavar="DIR", help="folder of datasets [%(default)s]"
    )
    convert = commands.add_parser(
        "convert", help="run a description's `convert:` steps on data that is there"
    )
    convert.add_argument("name", help="dataset YAML, shipped name or path")
    convert.add_argument("folder", type=Path, help="the dataset's folder")
    cache = commands.add_parser("cache", help="list or remove files of decoded pictures")
    cache.add_argument(
        "folder", nargs="?", type=Path, metavar="DIR", help="folder of the files [.cache in the runs folder]"
    )
    cache.add_argument("--remove", action="store_true", help="remove the files that no process uses")
    cache.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


_Body = Callable[[argparse.Namespace], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command says, and return the exit code."""
    given = build_parser().parse_args(arguments)
    bodies: dict[str, _Body] = {"download": _download, "convert": _convert, "cache": _cache}
    return run_command(lambda: given, bodies[given.command], debug=lambda given: False)


def _download(given: argparse.Namespace) -> None:
    progress = Progress()
    for name in given.names:
        weights = official_name(name)
        if weights is not None:
            progress.say(str(official_weights(weights, progress)))
        else:
            acquire(find_config("datasets", name), into=given.into, say=progress.say, show=progress.show)


def _convert(given: argparse.Namespace) -> None:
    path = find_config("datasets", given.name)
    steps = [step for step in read_steps(path) if isinstance(step, Convert)]
    if not steps:
        raise DataError(f"{path}: has no `convert:` steps; its labels are ready as they are published")
    if not given.folder.is_dir():
        raise DataError(f"{given.folder}: no such folder; give the one that holds the dataset")
    names = class_names(path, read_yaml(path))
    run_steps(steps, given.folder.absolute(), names, archives=given.folder, say=Progress().say)


def _cache(given: argparse.Namespace) -> None:
    folder = given.folder.absolute() if given.folder else runs_root() / CACHE_FOLDER
    removed = remove_idle(folder) if given.remove else []
    kept = kept_files(folder)
    if given.json:
        print(json.dumps({"folder": str(folder), "files": _plain(kept), "removed": _plain(removed)}))
        return
    for file in removed:
        print(f"removed  {_line(file)}")
    for file in kept:
        print(f"{'in use' if file.in_use else 'idle':<7}  {_line(file)}")
    print(f"{folder}: {len(kept)} files, {sum(file.nbytes for file in kept) / 2**30:.2f} GiB")


def _plain(files: list[KeptFile]) -> list[dict[str, Any]]:
    return [{**asdict(file), "path": str(file.path)} for file in files]


def _line(file: KeptFile) -> str:
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.used_at))
    content = f"{file.pictures} pictures at {file.image_size} px" if file.pictures else "damaged or outdated"
    return f"{file.path.name[:12]}…  {file.nbytes / 2**30:8.2f} GiB  used {used}  {content}"


if __name__ == "__main__":
    sys.exit(main())
