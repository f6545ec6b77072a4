#!/usr/bin/env python3
"""Change the owner of a runs folder to the replicas' user, and remove set-user-id bits in it.

    handover.py RUNS [UID:GID]      as root: make a missing folder, hand over root's files, print UID:GID

Users who may write the folder can swap names in it at any moment. Each file is therefore opened first, and then checked
and changed through its descriptor. The image's entry point runs this file by its path, and `launcher up` sends it to
machines reached by ssh: standard library of Python 3.8 or newer only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

if __package__ in (None, ""):  # run by its path: import the package, not the modules beside this file
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from starling.core.files.folder import Folder, link_to_nothing, mount_of
from starling.core.log_lines import lines_to

logger = logging.getLogger("starling.core.handover")  # its name also where the file is run by its path

NOBODYS_ID = 10001
"""The uid and gid of replicas if root owns the runs folder; no user has this id, so results go to no stranger."""

_SET_IDS = stat.S_ISUID | stat.S_ISGID
_EXECUTABLE = stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_CAPABILITY = "security.capability"
_MOST_LINKS = 40
_MOST_TOLD = 5
FIRST_S, EACH_S = 2.0, 10.0
"""Seconds until a walk first reports its progress, and between later reports."""
STILL = "still looking through"
"""The beginning of a line of progress."""


class Refused(Exception):
    """The folder cannot be handed over; the message says why, and names the remedy."""


class Account:
    """The changes in a runs folder, and the entries left unchanged."""

    def __init__(self) -> None:
        self.handed = self.stripped = self.left_count = 0
        self.left: list[str] = []

    def leave(self, path: Path, why: str) -> None:
        """Note an unchanged entry; only the first few are kept by name."""
        self.left_count += 1
        if len(self.left) < _MOST_TOLD:
            self.left.append(f"{_shown(path)}: {why}")

    def lines(self) -> list[str]:
        """Return remarks for the user, one per line."""
        lines = [f"{self.stripped} files lost their set-user-id or set-group-id bit"] if self.stripped else []
        more = self.left_count - len(self.left)
        return [*lines, *self.left, *([f"… and {more} more such entries"] if more else [])]


def _shown(path: Path) -> str:
    """Return a path for a terminal, without control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(path))


def allowed_user(uid: int, gid: int) -> bool:
    """Return whether replicas may run as this user: neither root nor in root's group."""
    return 0 < uid < 2**31 and 0 < gid < 2**31


def user_for(state: os.stat_result) -> tuple[int, int]:
    """Return the uid and gid of a folder's replicas: the owner's, or NOBODYS_ID if root owns the folder."""
    if state.st_uid == 0:
        return NOBODYS_ID, NOBODYS_ID
    return state.st_uid, state.st_gid or state.st_uid


def open_top(path: Path, trusted: Sequence[int] = (0,)) -> Folder:
    """Open a runs folder for root; only here, links in `path` are followed.

    Raises Refused if a link leads to a folder that root owns and neither root nor a `trusted` user made the link:
    otherwise any user could get any of root's folders handed over.
    """
    at, todo = os.open("/", os.O_PATH), list(reversed(path.absolute().parts[1:]))
    makers: list[int] = []
    try:
        while todo:
            found = os.open(todo[-1] or ".", os.O_PATH | os.O_NOFOLLOW, dir_fd=at)
            todo.pop()
            state = os.fstat(found)
            if not stat.S_ISLNK(state.st_mode):
                os.close(at)
                at = found
                continue
            makers.append(state.st_uid)
            target = os.readlink("", dir_fd=found)
            os.close(found)
            if len(makers) > _MOST_LINKS:
                raise Refused(f"{path}: too many links lead on from one another")
            if target.startswith("/"):
                os.close(at)
                at = os.open("/", os.O_PATH)
            todo.extend(reversed(target.split("/")))
        top = Folder(os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=at), path)
    except OSError as error:
        raise link_to_nothing(path) or type(error)(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(at)
    strangers = {*makers} - {0, *trusted}
    if strangers and os.fstat(top.descriptor).st_uid == 0:
        real = os.readlink(top.proc_path)
        top.close()
        raise Refused(
            f"{path}: a link of uid {min(strangers)} leads to {real}, which root owns, and root hands over no folder through "
            "another user's link; if you mean that folder, name it directly"
        )
    return top


def hand_over(
    top: Folder,
    uid: int,
    gid: int,
    monotonic: Callable[[], float] = time.monotonic,
) -> Account:
    """Change the owner of root's files and folders below `top`, and then of `top`, to a user; other owners stay.

    `top` must belong to root or to that user; in any other folder only set-id bits are taken away. Of root's files that
    somebody else may have put there, by a hard link or a rename, only those that everybody may read anyway, and that
    have no other name, are handed over. Links, devices, sockets and pipes stay as they are, and so does what is mounted
    below. A long walk is logged now and then. Raises Refused for a folder of everybody's, such as /scratch, and where the file system does not let root
    change owners.
    """
    assert allowed_user(uid, gid)
    state = os.fstat(top.descriptor)
    if state.st_uid == 0 and state.st_mode & stat.S_ISVTX and state.st_mode & stat.S_IWOTH:
        raise Refused(
            f"{_shown(top.path)}: is a world-writable folder of root's (mode {stat.S_IMODE(state.st_mode):o}), and its owner could "
            "remove all users' files in it; give a new folder below it"
        )
    giving = state.st_uid in (0, uid)
    account, keeper = Account(), _Keeper(top, uid, gid if giving else -1)
    for folder, name, state in _told(top.tree(folders_last=True), top.path, monotonic):
        keeper.look(folder, name, state, account)
    if giving:
        with _explained(top.path, uid, gid):
            _hand_top(top, uid, gid, account)
    return account


def _hand_top(top: Folder, uid: int, gid: int, account: Account) -> None:
    """Hand over the folder itself at the very end: after an interruption, the next call starts from the beginning.

    Access for other users is removed, because nobody on the host should reach files of replicas. If others may write
    the folder, it is shared on purpose, and its mode stays.
    """
    state = os.fstat(top.descriptor)
    if state.st_uid == uid:
        return
    if not state.st_mode & _OTHERS_WRITE:
        os.fchmod(top.descriptor, stat.S_IMODE(state.st_mode) & ~0o077)
    os.fchown(top.descriptor, uid, gid)
    account.handed += 1


def _told(
    entries: Iterator[tuple[Folder, str, os.stat_result]],
    path: Path,
    monotonic: Callable[[], float],
) -> Iterator[tuple[Folder, str, os.stat_result]]:
    """Pass on the entries of a walk, and log now and then how many they are: a folder of millions is an honest one."""
    say_at = monotonic() + FIRST_S
    for count, entry in enumerate(entries, 1):
        if (now := monotonic()) >= say_at:
            logger.info(f"{STILL} {_shown(path)}: {count:,} files so far")
            say_at = now + EACH_S
        yield entry


def strip_set_ids(
    top: Folder,
    limit_s: float | None = None,
    monotonic: Callable[[], float] = time.monotonic,
) -> Account:
    """Remove the set-user-id and set-group-id bits of the files below `top` that this process may change.

    Stops silently after `limit_s` seconds: a user who may write the folder can make it endless.
    """
    account, keeper = Account(), _Keeper(top, os.geteuid(), -1)
    until = None if limit_s is None else time.monotonic() + limit_s
    for folder, name, state in _told(top.tree(), top.path, monotonic):
        if until is not None and time.monotonic() > until:
            break
        with contextlib.suppress(Refused):
            keeper.look(folder, name, state, account)
    return account


class _Keeper:
    """Changes entries of a runs folder whose replicas run as `uid`; gid -1 means that no owner changes."""

    def __init__(self, top: Folder, uid: int, gid: int) -> None:
        self._uid, self._gid, self._me = uid, gid, os.geteuid()
        self._mount = mount_of(top.descriptor)
        self._records = top.path / ".launcher"

    def look(self, folder: Folder, name: str, state: os.stat_result, account: Account) -> None:
        """Check an entry by its state in the walk; if it needs a change, open it, check again, and change it."""
        if not self._wants_change(state):
            return
        with contextlib.suppress(FileNotFoundError), _held(folder, name) as descriptor:
            found = os.fstat(descriptor)
            if self._wants_change(found) and mount_of(descriptor) == self._mount:
                with _explained(folder.path / name, self._uid, self._gid):
                    self._change(folder, name, descriptor, found, account)

    def _wants_change(self, state: os.stat_result) -> bool:
        """Return whether the mode or the owner of an entry may have to change."""
        if stat.S_ISREG(state.st_mode):
            own = self._me in (0, state.st_uid)
            bits = (own and state.st_mode & _SET_IDS) or (self._me == 0 and state.st_mode & _EXECUTABLE)
            return bool(bits) or self._gives(state)
        if stat.S_ISBLK(state.st_mode) or stat.S_ISCHR(state.st_mode):
            return self._me == 0
        return stat.S_ISDIR(state.st_mode) and self._gives(state)

    def _is_record(self, folder: Folder, name: str) -> bool:
        """Return whether an entry is a record of the local engine, which is valid only while root owns it."""
        return folder.path == self._records or folder.path / name == self._records

    def _gives(self, state: os.stat_result) -> bool:
        return self._gid >= 0 and state.st_uid == 0

    def _change(
        self, folder: Folder, name: str, descriptor: int, found: os.stat_result, account: Account
    ) -> None:
        path = folder.path / name
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            account.leave(path, "is a device node, which no run makes; check it, and remove it")
            return
        place = f"/proc/self/fd/{descriptor}"  # the open file itself, whatever its names are now
        if stat.S_ISREG(found.st_mode):
            # All names of a replica's own file are the replica's; another user's file may also be a system program.
            alone = found.st_nlink == 1 or found.st_uid in {self._uid, self._me} - {0}
            armed = bool(found.st_mode & _SET_IDS) or (self._me == 0 and _has_capabilities(place))
            if armed and not alone:
                account.leave(
                    path,
                    f"has a set-id bit and {found.st_nlink} names, one of them perhaps elsewhere; find them "
                    f"(find / -samefile), and remove the bit: chmod ug-s",
                )
            elif armed:
                _disarm(place, found)
                account.stripped += 1
        if not self._gives(found) or self._is_record(folder, name):
            return
        if stat.S_ISREG(found.st_mode) and not _surely_roots(folder, found):
            account.leave(path, "belongs to root, but another user may have put it there: its owner stays")
            return
        os.chown(place, self._uid, self._gid)
        account.handed += 1


def _surely_roots(folder: Folder, state: os.stat_result) -> bool:
    """Return whether a file may be handed over: it has one name, and root put it here or it is world-readable."""
    holder = os.fstat(folder.descriptor)
    private = holder.st_uid == 0 and not holder.st_mode & _OTHERS_WRITE
    return state.st_nlink == 1 and (private or bool(state.st_mode & stat.S_IROTH))


def _disarm(place: str, state: os.stat_result) -> None:
    os.chmod(place, stat.S_IMODE(state.st_mode) & ~_SET_IDS)
    if _has_capabilities(place):
        os.removexattr(place, _CAPABILITY)


def _has_capabilities(place: str) -> bool:
    try:
        return bool(os.getxattr(place, _CAPABILITY))
    except OSError:
        return False


@contextlib.contextmanager
def _held(folder: Folder, name: str) -> Iterator[int]:
    """Hold an entry with O_PATH: opening a device or a pipe itself would have side effects."""
    descriptor = folder.open(name, os.O_PATH)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(path: Path, uid: int, gid: int) -> Iterator[None]:
    """Turn a refusal of the file system into Refused, with the remedy."""
    try:
        yield
    except OSError as error:
        raise Refused(
            f"{_shown(path)}: cannot be given to {uid}:{gid if gid >= 0 else uid} ({error.strerror}); its file system lets root change "
            "nothing (NFS with root_squash, a user namespace, a read-only or immutable file). Replicas never run as root: "
            "give a runs folder that belongs to an ordinary user, and name that user with --user UID:GID"
        ) from None


def _person_behind_root() -> int:
    """Return the outside uid that only root maps to in this user namespace, as in a rootless engine; else 0."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/uid_map") as file:
        for line in file:
            inside, outside, count = map(int, line.split())
            if inside == 0 and count == 1:
                return outside
    return 0


def take(path: Path, user: tuple[int, int] | None) -> tuple[tuple[int, int], Account]:
    """Make the folder where it is missing, hand it over, and return the uid and gid that replicas run as.

    Without `user`, replicas run as the folder's owner, and a folder that root does not own stays unchanged. Raises
    Refused and OSError.
    """
    with contextlib.suppress(FileExistsError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700)
    with open_top(path) as top:
        state = os.fstat(top.descriptor)
        who = user or user_for(state)
        person = _person_behind_root() if user is None and state.st_uid == 0 else 0
        if person:
            raise Refused(
                f"{path}: root in this container is uid {person} outside, and replicas never run as root; "
                "give podman run --userns keep-id, or run as another user: --user UID:GID"
            )
        if user is None and state.st_uid != 0:
            return who, Account()
        return who, hand_over(top, *who)


def _say(line: str) -> None:
    sys.stderr.write(f"starling: {line}\n")
    sys.stderr.flush()


def main(argv: Sequence[str]) -> int:
    """Hand a folder over as the arguments say, print `UID GID`, and return the exit code."""
    path = Path(argv[0])
    try:
        user = tuple(map(int, argv[1].split(":"))) if len(argv) > 1 else None
        if user is not None and (len(user) != 2 or not allowed_user(*user)):
            raise Refused(f"{argv[1]}: replicas run as UID:GID, and never as root; give another user")
        with lines_to(_say):
            (uid, gid), account = take(path, user)  # type: ignore[arg-type]
    except (Refused, OSError) as error:
        _say(str(error))
        return 2
    if account.handed and user is None:
        sys.stderr.write(
            f"starling: {_shown(path)} belonged to root and now belongs to {uid}:{gid} only, because trainers never run as root; "
            "make the folder yourself beforehand to own the results\n"
        )
    for line in account.lines():
        _say(line)
    sys.stdout.write(f"{uid} {gid}{_reach(uid, gid) if user is None else ''}\n")
    return 0


def _reach(uid: int, gid: int) -> str:
    """Return ` closed` if only a capability of root's can read a mounted folder of root's, ` open` if none is needed.

    That capability also allows writing, so it is kept only if the kernel's Landlock can prevent the writing.
    """
    from starling.core.confine import NEEDED_VERSION, landlock_version

    shut = [place for place in _mounted_folders() if not _may_enter(place, uid, gid)]
    if not shut:
        return " open"
    if landlock_version() >= NEEDED_VERSION:
        return " closed"
    sys.stderr.write(
        f"starling: {shut[0]} is closed to {uid}:{gid}, as whom the trainer runs: open the folder on the host (chmod o+x), "
        "mount the folders in it that are needed, or give docker run --user UID:GID\n"
    )
    return " open"


def _mounted_folders() -> Iterator[str]:
    """Yield the folders that are mounted into this container from outside."""
    with open("/proc/self/mountinfo") as file:
        for line in file:
            place = line.split()[4].encode().decode("unicode_escape")
            if (
                place != "/"
                and not place.startswith(("/proc", "/sys", "/dev", "/etc/", "/run/"))
                and os.path.isdir(place)
            ):
                yield place


def _may_enter(place: str, uid: int, gid: int) -> bool:
    state = os.stat(place)
    shift = 6 if state.st_uid == uid else 3 if state.st_gid == gid else 0
    return bool(state.st_mode >> shift & 1) or state.st_uid not in (0, uid)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
