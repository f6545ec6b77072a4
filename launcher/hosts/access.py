"""Whether the user that replicas run as may read the data and write the runs folder, judged by mode and owner.

Inside a container that user has no other group and no capability, root included. Docker itself follows the path to what
it mounts, so only what is mounted counts, not the folders above it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePath

from launcher.problems import Problems
from starling.core.errors import StarlingError, UsageError
from starling.core.files.kinds import IMAGE_SUFFIXES, is_hidden, suffix_of

READ, WRITE, ENTER = 4, 2, 1

MOST_OF_A_FOLDER = 20
"""A sample: permissions rarely differ from file to file, and a dataset may hold a million."""
IMAGES_AND_LABELS = IMAGE_SUFFIXES | {".txt"}


def check_data(reads: Mapping[Path, type[StarlingError]], shown: Sequence[Path], user: str) -> None:
    """Raise for what `user` could not read or see inside a replica.

    `reads` are the files and folders that a training opens, each with the error that it is; `shown` what is mounted.
    """
    uid, gid = map(int, user.split(":"))
    problems = Problems()
    for place, kind in reads.items():
        problems.check(_check_place, place, kind, shown, uid, gid)
        labels = _label_folder(place)
        if labels is not None and labels.is_dir():
            problems.check(_check_place, labels, kind, shown, uid, gid)
    problems.raise_any()


def _check_place(place: Path, kind: type[StarlingError], shown: Sequence[Path], uid: int, gid: int) -> None:
    """Check the way from the mount to the place, the place, and some of what is in it."""
    root = next((item for item in shown if place.is_relative_to(item)), place)
    way = [
        root.joinpath(*place.relative_to(root).parts[:depth])
        for depth in range(len(place.relative_to(root).parts))
    ]
    for path in (*way, place, *_sample(place)):
        try:
            state = path.stat()
        except OSError:
            continue  # it vanished, or is a link to nowhere: the trainer counts those
        is_folder = stat.S_ISDIR(state.st_mode)
        if path != root and is_folder and path.is_symlink():
            target = PurePath(os.path.abspath(path.parent / os.readlink(path)))
            if not any(target.is_relative_to(item) for item in shown):
                raise kind(
                    f"{path}: leads to {target}, which replicas do not see; put the files themselves there, or name "
                    "that folder in the dataset's YAML"
                )
        needed = READ | ENTER if is_folder else READ
        if not may(path, state, uid, gid, needed):
            raise kind(
                f"{path}: replicas run as {uid}:{gid} and may not read it ({_owner_words(state)}); "
                f"{_reading_remedy(path, state, uid, needed)}"
            )


def _sample(place: Path) -> list[Path]:
    """Return some folders, pictures and labels in a folder; nothing for a file, or a folder that cannot be listed."""
    try:
        with os.scandir(place) as entries:
            wanted = (
                Path(entry.path)
                for entry in entries
                if not is_hidden(entry.name)
                and (suffix_of(entry.name) in IMAGES_AND_LABELS or entry.is_dir())
            )
            return list(islice(wanted, MOST_OF_A_FOLDER))
    except OSError:
        return []


def _label_folder(place: Path) -> Path | None:
    """Return where the labels of a folder of pictures are: `labels` in place of the last `images`."""
    parts = list(place.parts)
    if "images" not in parts:
        return None
    parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts)


def check_secret_file(path: Path, user: str, variable: str) -> None:
    """Raise UsageError when `user` could not read the file with a password or keys that `variable` names."""
    uid, gid = map(int, user.split(":"))
    state = path.stat()
    if not may(path, state, uid, gid, READ):
        raise UsageError(
            f"{variable}={path}: replicas run as {uid}:{gid} and may not read it ({_owner_words(state)}); "
            f"setfacl -m u:{uid}:r {path}, or give --user {state.st_uid}:{state.st_gid}"
        )


def check_runs_access(runs: Path, fleet: str, user: str, caller: int) -> None:
    """Raise UsageError when `user` could not write the runs folder, or the fleet's own folder in it.

    `caller` is the uid of this process: folders made by it are its own, and root gives its own to `user`.
    """
    uid, gid = map(int, user.split(":"))
    if not runs.exists():
        if caller not in (0, uid):
            raise UsageError(
                f"--user {user}: {runs} would be made by you ({caller}) and could not be written by {user}; make it and "
                f"give it to them (sudo install -d -o {uid} -g {gid} {runs}), or leave --user out"
            )
        return
    handed_over = caller == 0 and runs.stat().st_uid in (0, uid)
    below = PurePath(fleet).parts
    for path in (runs, runs / ".workers", *(runs.joinpath(*below[:n]) for n in range(1, len(below) + 1))):
        if not path.is_dir():
            continue
        state = path.stat()
        if (handed_over and state.st_uid == 0) or may(path, state, uid, gid, READ | WRITE | ENTER):
            continue
        raise UsageError(
            f"--runs {runs}: replicas run as {uid}:{gid} and may not write in {path} ({_owner_words(state)}); "
            f"sudo chown -R {uid}:{gid} {path}, or give --user {state.st_uid}:{state.st_gid}, or another --runs"
        )


def may(path: Path, state: os.stat_result, uid: int, gid: int, needed: int) -> bool:
    """Return whether mode and owner allow it; an access control list on the path is given the benefit of the doubt."""
    if state.st_uid == uid:
        granted = state.st_mode >> 6
    elif state.st_gid == gid:
        granted = state.st_mode >> 3
    else:
        granted = state.st_mode
    return granted & needed == needed or _has_list(path)


def _has_list(path: Path) -> bool:
    try:
        return bool(os.getxattr(path, "system.posix_acl_access"))
    except OSError:
        return False


def _owner_words(state: os.stat_result) -> str:
    return f"owner {state.st_uid}:{state.st_gid}, mode {state.st_mode & 0o7777:03o}"


def _reading_remedy(path: Path, state: os.stat_result, uid: int, needed: int) -> str:
    if state.st_mode >> 3 & needed == needed:
        return f"give --user {uid}:{state.st_gid}, whose group may, or chmod -R o+rX {path}"
    return f"chmod -R o+rX {path}, or give --user {state.st_uid}:{state.st_gid}"
