"""Check whether the replicas' user may read the data and write the runs folder.

Inside a container the user, even root, has no other group and no capability.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

from launcher.hosts.access import PathState, ReadPath
from launcher.problems import Problems
from starling.core.errors import UsageError

READ, WRITE, ENTER = 4, 2, 1


def check_data(reads: Sequence[ReadPath], shown: Sequence[Path], user: str) -> None:
    """Raise an error for each path that `user` could not read or see inside a replica; `shown` are the mounts."""
    uid, gid = map(int, user.split(":"))
    problems = Problems()
    for read in reads:
        problems.check(_check_read, read, shown, uid, gid)
    problems.raise_any()


def _check_read(read: ReadPath, shown: Sequence[Path], uid: int, gid: int) -> None:
    for state in read.states:
        target = state.leads_to
        if target and state.path != read.root and not any(target.is_relative_to(item) for item in shown):
            raise read.error(
                f"{state.path}: leads to {target}, which replicas do not see; put the files themselves there, or name "
                "that folder in the dataset's YAML"
            )
        needed = READ | ENTER if state.is_folder else READ
        if not may(state, uid, gid, needed):
            raise read.error(
                f"{state.path}: replicas run as {uid}:{gid} and may not read it ({_owner_words(state)}); "
                f"{_reading_remedy(state, uid, needed)}"
            )


def check_secret_file(state: PathState, variable: str, user: str) -> None:
    """Raise UsageError if `user` could not read the file with a password or keys that `variable` names."""
    uid, gid = map(int, user.split(":"))
    if not may(state, uid, gid, READ):
        raise UsageError(
            f"{variable}={state.path}: replicas run as {uid}:{gid} and may not read it ({_owner_words(state)}); "
            f"setfacl -m u:{uid}:r {state.path}, or give --user {state.uid}:{state.gid}"
        )


def check_runs_access(runs: Path, folders: Sequence[PathState], user: str, caller: int) -> None:
    """Raise UsageError if `user` could not write the runs folder, or the fleet's folders in it.

    `folders` are the existing ones, the runs folder first. `caller` is the launcher's uid: the launcher owns folders
    that it makes, and if root calls, `user` becomes the owner of root's folders.
    """
    uid, gid = map(int, user.split(":"))
    if not folders:
        if caller not in (0, uid):
            raise UsageError(
                f"--user {user}: {runs} would be made by you ({caller}) and could not be written by {user}; make it and "
                f"give it to them (sudo install -d -o {uid} -g {gid} {runs}), or leave --user out"
            )
        return
    handed_over = caller == 0 and folders[0].uid in (0, uid)
    for state in folders:
        if not (handed_over and state.uid == 0) and not may(state, uid, gid, READ | WRITE | ENTER):
            raise UsageError(
                f"--runs {runs}: replicas run as {uid}:{gid} and may not write in {state.path} ({_owner_words(state)}); "
                f"sudo chown -R {uid}:{gid} {state.path}, or give --user {state.uid}:{state.gid}, or another --runs"
            )


def may(state: PathState, uid: int, gid: int, needed: int) -> bool:
    """Return whether owner and mode grant `needed`; a path with an access control list is assumed to grant it."""
    if state.uid == uid:
        granted = state.mode >> 6
    elif state.gid == gid:
        granted = state.mode >> 3
    else:
        granted = state.mode
    return granted & needed == needed or state.has_list


def _owner_words(state: PathState) -> str:
    return f"owner {state.uid}:{state.gid}, mode {stat.S_IMODE(state.mode):03o}"


def _reading_remedy(state: PathState, uid: int, needed: int) -> str:
    if state.mode >> 3 & needed == needed:
        return f"give --user {uid}:{state.gid}, the group that may, or chmod -R o+rX {state.path}"
    return f"chmod -R o+rX {state.path}, or give --user {state.uid}:{state.gid}"
