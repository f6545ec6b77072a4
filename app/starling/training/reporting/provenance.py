"""Where a run comes from: the code's commit and what was changed since, the image, the datasets."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from starling.core.files.atomic import write_atomic
from starling.core.redaction import Redaction
from starling.core.settings.train import TrainConfig
from starling.data.dataset.dataset import Dataset
from starling.outputs.run_dir import RunDir

IMAGE_COMMIT = "STARLING_COMMIT"
"""The commit that an image was built of, with `-dirty` behind it where the tree had changes: `git describe` says so."""
_DIFF_BYTES = 1 << 20
_GIT_S = 5.0
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Code:
    """The version of the code that trains; empty where neither a repository nor the image tells it."""

    commit: str = ""
    diff: str = ""
    is_dirty: bool = False
    """Whether it is changed since that commit, also where the changes themselves are not known."""

    def tags(self) -> dict[str, str]:
        """Return what trackers show of it."""
        return {"git_commit": self.commit, "git_dirty": str(self.is_dirty)} if self.commit else {}


@cache
def code_version(folder: Path = _PACKAGE) -> Code:
    """Return commit and uncommitted changes of the repository that `folder` is in; files git does not know are left out.

    In an image there is none: its build says of which commit it is.
    """
    commit = _git(folder, "rev-parse", "HEAD").strip()
    if not commit:
        commit, dash, _ = os.environ.get(IMAGE_COMMIT, "").partition("-dirty")
        return Code(commit, is_dirty=bool(dash))
    diff = _git(folder, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD")
    shown = diff if len(diff) <= _DIFF_BYTES else diff[:_DIFF_BYTES] + "\n… cut here: too long\n"
    return Code(commit, shown, is_dirty=bool(diff))


def keep_changes(run: RunDir) -> None:
    """Write what the code has changed since its commit, if anything, into the run directory, without secrets."""
    if diff := code_version().diff:
        write_atomic(run.diff, Redaction()(diff))


def origin_tags(
    config: TrainConfig, train: Dataset, environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return what a run, or a search on several machines, is made of: code, image (if the launcher named it), data, seed."""
    image = environment.get("STARLING_IMAGE")
    return {
        "seed": str(config.seed),
        "data_digest": train.digest,
        **code_version().tags(),
        **({"image": image} if image else {}),
    }


def place_tags(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the machine's (or container's) name, and that of the replica, if it is one."""
    replica = environment.get("STARLING_REPLICA")
    return {"host": platform.node(), **({"replica": replica} if replica else {})}


def dataset_fields(config: TrainConfig, train: Dataset, val: Dataset) -> list[dict[str, Any]]:
    """Return the fields of the events that tell which images and labels are used to train and to validate."""
    return [
        {
            "role": role,
            "name": Path(config.data).stem,
            "digest": data.digest,
            "source": config.data,
            "figures": {"images": len(data), "objects": sum(len(rows) for rows in data.labels)},
            "classes": list(data.names),
        }
        for role, data in (("train", train), ("val", val))
    ]


def _git(folder: Path, *arguments: str) -> str:
    """Return what git prints, or an empty string: there is none, this is no repository, or it takes too long."""
    try:
        ended = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_GIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout.decode(errors="replace") if ended.returncode == 0 else ""
