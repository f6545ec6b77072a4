"""Run folders below `runs/`, for `clean`: which are a fleet's, whether anybody works in them, and their removal.

Replicas write there, at any moment, so nothing found is trusted: folders are held open by descriptors, links are never
followed, and only `<runs>/<project>/<name>` with a run's own files in it is ever removed, and only that very folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from launcher.errors import EngineError
from launcher.status.progress import read_json_below
from starling.core.errors import UsageError
from starling.core.files.folder import Folder, LinkRefused
from starling.core.lock import try_flock
from starling.core.words import printable
from starling.core.worker_status import FOLDER as WORKERS

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
_MOST_HELD = 200
"""Locks that are held at once; a replica may have left any number of files that look like locks."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of a run, and what is in it."""

    path: Path
    fleet: str
    files: int
    bytes: int
    identity: tuple[int, int] = (0, 0)
    """Device and inode: the folder that was looked at, whatever has its name by now."""


def run_folders(runs: Path, fleet: str, replicas: Iterable[str]) -> list[RunFolder]:
    """Return the folders that the runs of a fleet have left.

    They are `<runs>/<project>/<name>`, and the `name2`, `name3`, … that the fleet's replicas say they wrote. Raises
    UsageError for a fleet whose name would lead out of the runs folder, also through a link.
    """
    project, name = PurePosixPath(fleet).parent, PurePosixPath(fleet).name
    if fleet.startswith("/") or ".." in PurePosixPath(fleet).parts or not name or not project.parts:
        raise UsageError(f"{fleet}: is no fleet; its name is project/name")
    try:
        with Folder.resolve(runs) as top:
            names = [name]
            for replica in replicas:
                said = PurePosixPath(_said_folder(top, replica)).name
                if re.fullmatch(re.escape(name) + r"[1-9]\d{0,5}", said) and said not in names:
                    names.append(said)
            found = [_look(top, (*project.parts, folder), fleet) for folder in names]
    except FileNotFoundError:
        return []
    return [folder for folder in found if folder is not None]


def _said_folder(top: Folder, replica: str) -> str:
    """Return the run folder in a replica's status file; an empty text for anything else."""
    said = read_json_below(top, WORKERS, f"{replica}.json").get("run_dir")
    return said if isinstance(said, str) and "\0" not in said else ""


def _look(top: Folder, parts: Sequence[str], fleet: str) -> RunFolder | None:
    """Return the folder at `parts`, or None where there is none; raises UsageError for what is no run's folder."""
    path = top.path.joinpath(*parts)
    no_run = f"{path}: holds no run ({', '.join(_SIGNS[:4])}, …), so it stays; remove it by hand"
    try:
        folder = top.folder(*parts)
    except LinkRefused as link:
        raise UsageError(
            f"{link.filename}: is a link, which leads out of the runs folder; it and its target stay"
        ) from None
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise UsageError(no_run) from None
    with folder:
        if not any(folder.has(sign) for sign in _SIGNS):
            raise UsageError(no_run)
        files = size = 0
        for _, _, state in folder.tree():
            if not stat.S_ISDIR(state.st_mode):
                files += 1
                size += state.st_blocks * 512
        return RunFolder(path=path, fleet=fleet, files=files, bytes=size, identity=_identity(folder))


def _identity(folder: Folder) -> tuple[int, int]:
    state = os.fstat(folder.descriptor)
    return state.st_dev, state.st_ino


@contextlib.contextmanager
def unused(runs: Path, run: RunFolder) -> Iterator[Folder]:
    """Hold every lock in the folder, and give the folder; raises UsageError naming the first that somebody else holds."""
    with contextlib.ExitStack() as held, Folder.resolve(runs) as top:
        try:
            folder = held.enter_context(top.folder(*run.path.relative_to(runs).parts))
        except OSError:
            raise _changed(run) from None
        if _identity(folder) != run.identity:
            raise _changed(run)
        count = 0
        for holder, name, state in folder.tree():
            if stat.S_ISREG(state.st_mode) and (name.endswith(".lock") or holder.path.name == _LEASES):
                with contextlib.ExitStack() as lock:
                    _lock(run, holder, name, lock)
                    count += 1
                    if count <= _MOST_HELD:  # the others are only looked at
                        held.enter_context(lock.pop_all())
        with contextlib.suppress(OSError):  # a file system that locks no folders
            if not try_flock(
                folder.descriptor
            ):  # a trainer's second lock, should somebody remove the file of the first
                raise UsageError(
                    f"{run.path}: is in use (a process holds the folder), so it stays; end that first"
                )
        yield folder


def _lock(run: RunFolder, holder: Folder, name: str, held: contextlib.ExitStack) -> None:
    """Take one lock for as long as `held` lasts."""
    try:
        descriptor = holder.open(name, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return
    held.callback(os.close, descriptor)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return
    try:
        free = try_flock(descriptor)
    except OSError:
        return  # a file system without locks
    if not free:
        said = os.read(descriptor, 200).decode(errors="replace").strip().splitlines()
        who = printable(said[0]) if said else "a process"
        raise UsageError(
            f"{run.path}: is in use ({who} holds {holder.path.name}/{name}), so it stays; end that first"
        )


def _changed(run: RunFolder) -> UsageError:
    return UsageError(
        f"{run.path}: is not the folder that was listed, somebody has put another in its place; nothing was removed there: "
        "look at it, and call `launcher clean` again"
    )


def delete(runs: Path, run: RunFolder, folder: Folder) -> None:
    """Remove a run's folder, held open as `folder`, and its project's once that is empty; never what links lead to.

    It is first renamed, so that an interrupted removal leaves nothing that looks like a whole run; and what was renamed
    is removed only if it is the folder that was looked at. Raises EngineError for what the disk refuses, UsageError for
    another folder in its place.
    """
    parts = run.path.relative_to(runs).parts
    aside = f".removing-{secrets.token_hex(6)}"
    with contextlib.ExitStack() as held:
        try:
            way = [held.enter_context(Folder.resolve(runs))]
            for part in parts[:-1]:
                way.append(held.enter_context(way[-1].folder(part)))
            top, holder = way[0], way[-1]
            os.rename(parts[-1], aside, src_dir_fd=holder.descriptor, dst_dir_fd=top.descriptor)
            if not _is(top, aside, folder):
                with contextlib.suppress(OSError):
                    os.rename(aside, parts[-1], src_dir_fd=top.descriptor, dst_dir_fd=holder.descriptor)
                raise _changed(run)
            folder.empty()
            os.rmdir(aside, dir_fd=top.descriptor)
        except LinkRefused:
            raise _changed(run) from None
        except OSError as error:
            raise EngineError(
                f"{_whole(run, error)}: could not be removed ({error.strerror}); it belongs to another user, or the "
                "disk refuses: remove it by hand"
            ) from None
        for above, part in reversed(list(zip(way, parts[:-1], strict=False))):
            with contextlib.suppress(OSError):
                os.rmdir(part, dir_fd=above.descriptor)


def _is(top: Folder, name: str, folder: Folder) -> bool:
    """Return whether an entry of `top` is this very folder, and no link to it."""
    with contextlib.suppress(OSError):
        return os.path.samestat(top.stat(name), os.fstat(folder.descriptor))
    return False


def _whole(run: RunFolder, error: OSError) -> str:
    """Return the path that an error is about; a system call with a descriptor knows a name only."""
    named = str(error.filename or "")
    return named if named.startswith("/") else str(run.path)


def forget_workers(runs: Path, replicas: Iterable[str]) -> None:
    """Remove what the trainers and supervisors of replicas that are gone have told."""
    for replica in filter(lambda name: "/" not in name, replicas):
        for file in (f"{replica}.json", f"{replica}.restarts.json"):
            with (
                contextlib.suppress(OSError, ValueError),
                Folder.resolve(runs) as top,
                top.folder(WORKERS) as workers,
            ):
                os.unlink(file, dir_fd=workers.descriptor)
