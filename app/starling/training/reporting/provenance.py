"""The origin of a run: the commit of the code and the changes since, the container image, the datasets."""

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
"""Variable with the commit that the image was built from; `-dirty` follows if the tree had changes (`git describe`)."""
_DIFF_BYTES = 1 << 20
_GIT_S = 5.0
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Code:
    """The version of the training code; empty if neither a repository nor the image names it."""

    commit: str = ""
    diff: str = ""
    is_dirty: bool = False
    """Whether the code was changed since that commit; may be True with an empty `diff`."""

    def tags(self) -> dict[str, str]:
        """Return the version as tags for the trackers."""
        return {"git_commit": self.commit, "git_dirty": str(self.is_dirty)} if self.commit else {}


@cache
def code_version(folder: Path = _PACKAGE) -> Code:
    """Return commit and uncommitted changes of the repository that contains `folder`, without untracked files.

    Without a repository, as in an image, the commit comes from `STARLING_COMMIT`.
    """
    commit = _git(folder, "rev-parse", "HEAD").strip()
    if not commit:
        commit, dash, _ = os.environ.get(IMAGE_COMMIT, "").partition("-dirty")
        return Code(commit, is_dirty=bool(dash))
    diff = _git(folder, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD")
    shown = diff if len(diff) <= _DIFF_BYTES else diff[:_DIFF_BYTES] + "\n… cut here: too long\n"
    return Code(commit, shown, is_dirty=bool(diff))


def keep_changes(run: RunDir) -> None:
    """Write the uncommitted changes of the code, if there are any, into the run directory, without secrets."""
    if diff := code_version().diff:
        write_atomic(run.diff, Redaction()(diff))


def origin_tags(
    config: TrainConfig, train: Dataset, environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return the origin of a run or a search as tags: code, image (if the launcher named one), data digest, seed."""
    image = environment.get("STARLING_IMAGE")
    return {
        "seed": str(config.seed),
        "data_digest": train.digest,
        **code_version().tags(),
        **({"image": image} if image else {}),
    }


def place_tags(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the name of the machine or container, and the name of the replica if this process runs in a replica."""
    replica = environment.get("STARLING_REPLICA")
    return {"host": platform.node(), **({"replica": replica} if replica else {})}


def dataset_fields(config: TrainConfig, train: Dataset, val: Dataset) -> list[dict[str, Any]]:
    """Return the fields of the `dataset` events: which images and labels are used for training and for validation."""
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
    """Return what git prints; an empty string without git, without a repository, or after a timeout."""
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
