"""The one folder that replicas write: who owns it, and one `up` at a time on it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from launcher.errors import UsageError
from launcher.host_paths import is_the_systems
from launcher.lock_wait import wait_for_lock

NOBODYS_ID = 10001
"""The uid and gid of replicas when root calls: no person's, so results are not handed to a stranger."""


def replica_user(runs: Path, caller: tuple[int, int], asked: str | None) -> str:
    """Return the `uid:gid` that replicas run as: what was asked, else the caller's own.

    When root calls it is the owner of the runs folder. A folder that is new or empty is given to NOBODYS_ID, so
    that replicas are not root either; one that already holds root's files stays root's, and replicas are then root
    without a single capability. Raises UsageError for anything but UID:GID.
    """
    if asked is not None:
        uid, _, gid = asked.partition(":")
        if not (uid.isascii() and uid.isdigit() and gid.isascii() and gid.isdigit()):
            raise UsageError(f"--user {asked}: must be numbers, UID:GID; `id -u` and `id -g` print yours")
        return f"{int(uid)}:{int(gid)}"
    if caller[0] != 0:
        return f"{caller[0]}:{caller[1]}"
    if not runs.exists() or not any(runs.iterdir()):
        return f"{NOBODYS_ID}:{NOBODYS_ID}"
    owner = runs.stat()
    return f"{owner.st_uid}:{owner.st_gid}"


def check_runs(runs: Path) -> None:
    """Raise UsageError for a runs folder that cannot be one."""
    real = Path(os.path.realpath(runs))
    if is_the_systems((runs, real), Path.home()):
        leads = f", which leads to {real}" if real != runs else ""
        raise UsageError(
            f"--runs {runs}{leads}: replicas write there, so not a folder of the system's or a whole home; give one of "
            f"its own, for example {Path.home() / 'runs'}"
        )
    try:
        place = next(parent for parent in (runs, *runs.parents) if parent.exists())
    except PermissionError:
        raise UsageError(f"--runs {runs}: you may not look there; give a folder of your own") from None
    if not place.is_dir():
        raise UsageError(f"--runs {runs}: {place} is a file; give a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(
            f"--runs {runs}: you may not write in {place}; give another folder, or change its owner"
        )


@contextlib.contextmanager
def runs_folder(runs: Path, user: str, say: Callable[[str], None]) -> Iterator[None]:
    """Make the folder, give it to `user` when root calls, and hold it against every other `up` on this host.

    A folder made here is removed again when the block fails and left nothing in it. Raises EngineError when another
    `up` holds it for too long.
    """
    new = [place for place in (runs, *runs.parents) if not place.exists()]
    runs.mkdir(parents=True, exist_ok=True)
    try:
        if os.getuid() == 0 and user:
            _hand_over(runs, *map(int, user.split(":")))
        with _locked(runs, say):
            yield
    except BaseException:
        for place in new:
            with contextlib.suppress(OSError):
                place.rmdir()
        raise


def _hand_over(runs: Path, uid: int, gid: int) -> None:
    """Give root's files below the runs folder to the replicas' user; those of anybody else stay theirs."""
    if runs.stat().st_uid not in (0, uid) or uid == 0:
        return
    os.chown(runs, uid, gid, follow_symlinks=False)
    for folder, folders, files in os.walk(runs, followlinks=False):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            with contextlib.suppress(FileNotFoundError):
                if os.lstat(path).st_uid == 0:
                    os.chown(path, uid, gid, follow_symlinks=False)


@contextlib.contextmanager
def _locked(runs: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock on the folder itself: no lock file to leave behind, and a dead holder's is released."""
    descriptor = os.open(runs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def take() -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass  # a file system without locks; the engine's names still keep replicas single
        return True

    try:
        wait_for_lock(
            take,
            wait=lambda: "waiting for another `launcher up` on this runs folder",
            give_up=lambda: f"{runs}: another `launcher up` holds it; wait for that one, or end it",
            say=say,
        )
        yield
    finally:
        os.close(descriptor)
