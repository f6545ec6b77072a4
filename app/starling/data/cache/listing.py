"""`starling data cache`: list the files of decoded pictures, and remove those that nobody uses."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starling.data.cache.pixel_folder import CACHE_FOLDER, KeptFile, kept_files, remove_idle
from starling.outputs.run_dir import runs_root


def show_cache(folder: Path | None, *, remove: bool, as_json: bool) -> None:
    """Print what `folder` holds, by default that of the runs folder; first remove what no process uses, if asked."""
    folder = folder.absolute() if folder else runs_root() / CACHE_FOLDER
    removed = remove_idle(folder) if remove else []
    kept = kept_files(folder)
    if as_json:
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
