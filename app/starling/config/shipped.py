"""Find a layout, hyperparameter file, dataset description or search space: the user's file, else the shipped one."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Literal

from starling.core.errors import DataError, UsageError, suggest
from starling.core.files.refusals import readable
from starling.core.misplaced import misplaced
from starling.core.paths import at_home

Kind = Literal["layouts", "hyps", "datasets", "spaces"]

SHIPPED = Path(__file__).resolve().parent

CLASSIC_FOLDERS: dict[Kind, tuple[str, ...]] = {
    "layouts": ("models", "models/hub", "models/segment"),
    "hyps": ("data/hyps",),
    "datasets": ("data",),
    "spaces": (),
}
"""Folders of these files in guides for the classic trainer, relative to its root."""

DATASETS_FOLDER = Path("../datasets")
"""The folder of datasets: beside the current folder, as for the classic trainer."""

CLASSIC_ROOT = "/usr/src/app"
"""The root in the classic image; users paste paths such as `/usr/src/app/data/hyps/hyp.finetune.yaml`."""

_OPTION = {"layouts": "--cfg", "hyps": "--hyp", "datasets": "--data", "spaces": "--space"}


def find_config(kind: Kind, name: str) -> Path:
    """Return the path of the YAML file called `name`.

    An existing file is used. Otherwise a bare name (`yolov5n.yaml`, or `yolov5n`), or one in the classic trainer's
    folders (`data/hyps/hyp.finetune.yaml`), means the shipped file of that name.

    Raises UsageError, or DataError for a dataset, with the list of shipped files.
    """
    given = at_home(name)
    error = DataError if kind == "datasets" else UsageError
    with readable(error):
        if given.is_file():
            if wrong := misplaced(_OPTION[kind], given):
                raise error(f"{_OPTION[kind]} {name}: {wrong}")
            return given
    relative = PurePosixPath(name)
    if relative.is_absolute() and relative.is_relative_to(CLASSIC_ROOT):
        relative = relative.relative_to(CLASSIC_ROOT)
    if str(relative.parent) in (".", *CLASSIC_FOLDERS[kind]):
        shipped = SHIPPED / kind / (relative.name if relative.suffix else f"{relative.name}.yaml")
        if shipped.is_file():
            return shipped
    if wrong := misplaced(_OPTION[kind], given):
        raise error(f"{_OPTION[kind]} {name}: {wrong}")
    known = sorted(path.name for path in (SHIPPED / kind).glob("*.yaml"))
    raise error(
        f"{_OPTION[kind]} {name}: no such file{suggest(relative.name, known)}; "
        f"give a path, or one of: {', '.join(known)}"
    )
