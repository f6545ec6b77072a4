"""Run folders below `runs/`, for `clean`: which are a fleet's, whether anybody works in them, and their removal.

Replicas write there, so nothing found is trusted: links are never followed, and only `<runs>/<project>/<name>` with a
run's own files in it is ever removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from app.core.plain_json import parse_json
from launcher.errors import EngineError, UsageError
from launcher.progress import FOLDER as WORKERS
from launcher.progress import MOST_BYTES

_SIGNS = (
    ".lock",
    "opt.yaml",
    "results.csv",
    "events.jsonl",
    "study.journal",
    "study.lock",
    "evolve.csv",
    "weights",
)
"""A folder without any of these is no run's."""

_LEASES = "leases"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of a run, and what is in it."""

    path: Path
    fleet: str
    files: int
    bytes: int


def run_folders(runs: Path, fleet: str, replicas: Iterable[str]) -> list[RunFolder]:
    """Return the folders that the runs of a fleet have left.

    They are `<runs>/<project>/<name>`, and the `name2`, `name3`, … that the fleet's replicas say they wrote. Raises
    UsageError for a fleet whose name would lead out of the runs folder, also through a link.
    """
    project, name = PurePosixPath(fleet).parent, PurePosixPath(fleet).name
    if fleet.startswith("/") or ".." in PurePosixPath(fleet).parts or not name or not project.parts:
        raise UsageError(f"{fleet}: is no fleet; its name is project/name")
    names = [name]
    for replica in replicas:
        said = PurePosixPath(_said_folder(runs, replica)).name
        if re.fullmatch(re.escape(name) + r"[1-9]\d{0,5}", said) and said not in names:
            names.append(said)
    found = (_look(runs, runs / project / folder, fleet) for folder in names)
    return [folder for folder in found if folder is not None]


def _said_folder(runs: Path, replica: str) -> str:
    """Return the run folder in a replica's status file; an empty text for anything else."""
    if "/" in replica:
        return ""
    try:
        descriptor = os.open(runs / WORKERS / f"{replica}.json", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            said = parse_json(file.read(MOST_BYTES)).get("run_dir")
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
    return said if isinstance(said, str) and "\0" not in said else ""


def _look(runs: Path, path: Path, fleet: str) -> RunFolder | None:
    """Return the folder at `path`, or None where there is none; raises UsageError for what is no run's folder."""
    for place in (path, *path.parents[: len(path.relative_to(runs).parts) - 1]):
        if place.is_symlink():
            raise UsageError(
                f"{place}: is a link, which leads out of the runs folder; it and its target stay"
            )
    if not path.exists():
        return None
    if not path.is_dir() or not any(os.path.lexists(path / sign) for sign in _SIGNS):
        raise UsageError(f"{path}: holds no run ({', '.join(_SIGNS[:4])}, …), so it stays; remove it by hand")
    files = size = 0
    for found in _files(path):
        files += 1
        size += found.st_blocks * 512
    return RunFolder(path=path, fleet=fleet, files=files, bytes=size)


def _files(path: Path) -> Iterator[os.stat_result]:
    for folder, _, names in os.walk(path, followlinks=False):
        for name in names:
            with contextlib.suppress(OSError):
                yield os.lstat(os.path.join(folder, name))


@contextlib.contextmanager
def unused(run: RunFolder) -> Iterator[None]:
    """Hold every lock in the folder; raises UsageError naming the first that somebody else holds."""
    held: list[int] = []
    try:
        for path in _locks(run.path):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                continue
            held.append(descriptor)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                said = os.read(descriptor, 200).decode(errors="replace").strip().splitlines()
                who = "".join(letter for letter in said[0] if letter.isprintable()) if said else "a process"
                raise UsageError(
                    f"{run.path}: is in use ({who} holds {path.name}), so it stays; end that first"
                ) from None
            except OSError:
                continue  # a file system without locks
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def _locks(path: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(path, followlinks=False):
        for name in names:
            if name.endswith(".lock") or os.path.basename(folder) == _LEASES:
                yield Path(folder, name)


def delete(runs: Path, run: RunFolder) -> None:
    """Remove a run's folder, and its project's once that is empty; never what links in it lead to.

    It is first renamed, so that an interrupted removal leaves nothing that looks like a whole run. Raises EngineError
    for what the disk refuses.
    """
    aside = runs / f".removing-{secrets.token_hex(6)}"
    try:
        os.rename(run.path, aside)
        shutil.rmtree(aside)  # by descriptors: a folder swapped for a link meanwhile is not entered
    except OSError as error:
        raise EngineError(
            f"{error.filename or run.path}: could not be removed ({error.strerror}); it belongs to another user, or the "
            "disk refuses: remove it by hand"
        ) from None
    for place in run.path.parents:
        if place == runs or not place.is_relative_to(runs):
            break
        with contextlib.suppress(OSError):
            place.rmdir()


def forget_workers(runs: Path, replicas: Iterable[str]) -> None:
    """Remove what the trainers and supervisors of replicas that are gone have told."""
    for replica in replicas:
        for file in (f"{replica}.json", f"{replica}.restarts.json"):
            with contextlib.suppress(OSError):
                (runs / WORKERS / file).unlink()
