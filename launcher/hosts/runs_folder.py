"""The runs folder, the only folder that replicas write: its owner, and its lock for one `up` at a time."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from launcher.hosts.files import is_the_systems
from launcher.hosts.lock import wait_for_lock
from launcher.hosts.processes import caller_ids
from starling.core.errors import UsageError
from starling.core.files.folder import Folder
from starling.core.handover import (
    NOBODYS_ID,
    Refused,
    allowed_user,
    hand_over,
    open_top,
    strip_set_ids,
    user_for,
)
from starling.core.lock import try_flock

logger = logging.getLogger(__name__)

STRIP_S = 2.0
"""The time limit of an ordinary user's `up` for finding set-id bits, which endanger only that user's account."""


def replica_user(runs: Path, caller: tuple[int, int], asked: str | None) -> str:
    """Return the `uid:gid` that replicas run as: `asked`, else the caller's.

    If root calls, it is the owner of the runs folder. If root owns the runs folder, or the folder does not exist yet,
    it is NOBODYS_ID. Replicas never run as root, because a program of theirs with mode 4755 would make every user of
    the host root. Raises UsageError for anything but UID:GID, and for root in any spelling.
    """
    if asked is not None:
        uid, _, gid = asked.partition(":")
        if not (_is_number(uid) and _is_number(gid)):
            raise UsageError(f"--user {asked}: must be numbers, UID:GID; `id -u` and `id -g` print yours")
        check_user(f"{int(uid)}:{int(gid)}")
        return f"{int(uid)}:{int(gid)}"
    if caller[0] != 0:
        return f"{caller[0]}:{caller[1] or caller[0]}"
    try:
        owner = user_for(runs.stat())
    except FileNotFoundError:
        owner = NOBODYS_ID, NOBODYS_ID
    return f"{owner[0]}:{owner[1]}"


def check_user(user: str) -> None:
    """Raise UsageError for a `uid:gid` that replicas must not run as."""
    if not allowed_user(*map(int, user.split(":"))):
        raise UsageError(
            f"--user {user}: replicas never run as root or in root's group, and ids end at {2**31 - 1}: a program that "
            "root's replica leaves in the runs folder could make every user of the machine root; give another UID:GID, "
            "or leave --user out"
        )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 12


def check_runs(runs: Path) -> None:
    """Raise UsageError for a path that cannot be the runs folder."""
    real = Path(os.path.realpath(runs))
    if is_the_systems((runs, real), Path.home()):
        leads = f", which leads to {real}" if real != runs else ""
        raise UsageError(
            f"--runs {runs}{leads}: replicas write there, so it must not be a folder of the system or a whole home; give "
            f"a separate folder, for example {Path.home() / 'runs'}"
        )
    try:
        place = next(parent for parent in (runs, *runs.parents) if parent.exists())
    except PermissionError:
        raise UsageError(f"--runs {runs}: you may not access it; give a folder of your own") from None
    if not place.is_dir():
        raise UsageError(f"--runs {runs}: {place} is a file; give a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(
            f"--runs {runs}: you may not write in {place}; give another folder, or change its owner"
        )


@contextlib.contextmanager
def runs_folder(runs: Path, user: str) -> Iterator[None]:
    """Make the folder, hold it against every other `up` on this host, and give it to `user` when root calls.

    Set-id bits below the folder are removed. If the block fails, a folder made here is removed unless it has contents.
    Raises EngineError if another `up` holds the folder for too long, UsageError if the folder cannot be made or its
    owner cannot be changed.
    """
    with contextlib.ExitStack() as held:
        with _refused(runs):
            made = _make(runs, held)
        try:
            with _refused(runs):
                top = held.enter_context(_open(runs))
            with _locked(top):
                with _refused(runs):
                    _secure(top, user, made=bool(made))
                yield
        except BaseException:
            for holder, name in made:
                with contextlib.suppress(OSError):
                    os.rmdir(name, dir_fd=holder.descriptor)
            raise


def _make(runs: Path, held: contextlib.ExitStack) -> list[tuple[Folder, str]]:
    """Make the missing folders; return each new folder as its parent and its name, the deepest first.

    The runs folder has mode 0700; the folders above it have the modes of the user's own `mkdir`.
    """
    missing = [place for place in (runs, *runs.parents) if not os.path.lexists(place)]
    if not missing:
        return []
    made: list[tuple[Folder, str]] = []
    holder = held.enter_context(Folder.resolve(missing[-1].parent))
    for place in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(place.name, 0o700 if place == runs else 0o777, dir_fd=holder.descriptor)
            made.insert(0, (holder, place.name))
        if place != runs:
            holder = held.enter_context(holder.folder(place.name))
    return made


def _open(runs: Path) -> Folder:
    """Open the folder, and check again where its path leads."""
    top = open_top(runs, trusted=caller_ids()[:1]) if os.getuid() == 0 else Folder.resolve(runs)
    real = Path(os.readlink(top.proc_path))
    if is_the_systems((real,), Path.home()):
        top.close()
        raise Refused(f"--runs {runs}: leads to the system's folder {real}; give a folder of its own")
    return top


def _secure(top: Folder, user: str, *, made: bool) -> None:
    """Hand the folder over when root calls, and take set-id bits away; say what was left alone."""
    if os.getuid() != 0 or not user:
        account = strip_set_ids(top, STRIP_S if os.getuid() else None)
    else:
        if made and os.fstat(top.descriptor).st_uid != 0:
            raise Refused(
                f"{top.path}: was made by root and belongs to uid {os.fstat(top.descriptor).st_uid}: its file system does "
                "not know this machine's root (NFS with root_squash); make it as an ordinary user, and give --user UID:GID"
            )
        uid, gid = map(int, user.split(":"))
        account = hand_over(top, uid, gid)
    for line in account.lines():
        logger.info(f"note: {line}")


@contextlib.contextmanager
def _refused(runs: Path) -> Iterator[None]:
    try:
        yield
    except Refused as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(
            f"--runs {runs}: {error.filename or runs}: {error.strerror}; check the folder's owner, or give another"
        ) from None


@contextlib.contextmanager
def _locked(top: Folder) -> Iterator[None]:
    """Hold a lock on the folder itself: no lock file to leave behind, and a dead holder's is released."""

    def take() -> bool:
        try:
            return try_flock(top.descriptor)
        except OSError:
            return True  # a file system without locks; the engine's unique names still prevent duplicate replicas

    wait_for_lock(
        take,
        wait=lambda: "waiting for another `launcher up` on this runs folder",
        give_up=lambda: f"{top.path}: another `launcher up` holds it; wait for that one, or end it",
    )
    yield
