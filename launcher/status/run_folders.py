"""Run folders below `runs/`, for `clean`: find those of a fleet, check that no process uses them, and remove them.

Replicas write there at any moment, so no contents are trusted: folders are held open by descriptors, links are never
followed, and `clean` removes only a folder `<runs>/<project>/<name>` with a run's files that it has checked before.
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
"""A folder without any of these entries is no run folder."""

_LEASES = "leases"
_MOST_HELD = 200
"""The most locks held at once; a replica may have left any number of files that look like locks."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of a run, with the number and size of its files."""

    path: Path
    fleet: str
    files: int
    bytes: int
    identity: tuple[int, int] = (0, 0)
    """Device and inode of the checked folder, which another folder may have replaced since."""


def run_folders(runs: Path, fleet: str, replicas: Iterable[str]) -> list[RunFolder]:
    """Return the folders of a fleet's runs.

    They are `<runs>/<project>/<name>`, and each `name2`, `name3`, … that a replica of the fleet reports. Raises
    UsageError if the fleet's name leads out of the runs folder, also through a link.
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
    """Return the run folder in a replica's status file; an empty string if there is none."""
    said = read_json_below(top, WORKERS, f"{replica}.json").get("run_dir")
    return said if isinstance(said, str) and "\0" not in said else ""


def _look(top: Folder, parts: Sequence[str], fleet: str) -> RunFolder | None:
    """Return the folder at `parts`, or None if it does not exist; raises UsageError if it is no run folder."""
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
    """Take every lock in the folder, and yield the folder; raises UsageError that names a lock held by others."""
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
                    if count <= _MOST_HELD:  # the others are only tried
                        held.enter_context(lock.pop_all())
        with contextlib.suppress(OSError):  # the file system cannot lock folders
            if not try_flock(
                folder.descriptor
            ):  # a trainer also locks the folder, in case its lock file is removed
                raise UsageError(
                    f"{run.path}: is in use (a process holds the folder), so it stays; end that first"
                )
        yield folder


def _lock(run: RunFolder, holder: Folder, name: str, held: contextlib.ExitStack) -> None:
    """Take one lock until `held` closes."""
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
        f"{run.path}: another folder has replaced the listed one; nothing was removed there: "
        "look at it, and call `launcher clean` again"
    )


def delete(runs: Path, run: RunFolder, folder: Folder) -> None:
    """Remove a run's folder, held open as `folder`, and its project's folder once empty; never the targets of links.

    The folder is first renamed, so an interrupted removal leaves nothing that looks like a complete run. The renamed
    folder is removed only if it is the checked one. Raises EngineError if the removal fails, UsageError if another
    folder has replaced it.
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
    """Return whether an entry of `top` is this folder itself, not a link to it."""
    with contextlib.suppress(OSError):
        return os.path.samestat(top.stat(name), os.fstat(folder.descriptor))
    return False


def _whole(run: RunFolder, error: OSError) -> str:
    """Return the path of an error; system calls with a directory descriptor report only a name."""
    named = str(error.filename or "")
    return named if named.startswith("/") else str(run.path)


def forget_workers(runs: Path, replicas: Iterable[str]) -> None:
    """Remove the status files of removed replicas' trainers and supervisors."""
    for replica in filter(lambda name: "/" not in name, replicas):
        for file in (f"{replica}.json", f"{replica}.restarts.json"):
            with (
                contextlib.suppress(OSError, ValueError),
                Folder.resolve(runs) as top,
                top.folder(WORKERS) as workers,
            ):
                os.unlink(file, dir_fd=workers.descriptor)
