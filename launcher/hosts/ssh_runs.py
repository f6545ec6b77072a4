"""The runs folder and the lock of a machine reached by ssh, as `runs_folder` and `lock` handle them on this machine."""

from __future__ import annotations

import base64
import contextlib
import logging
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import starling.core.files.folder
import starling.core.handover
import starling.core.log_lines
from launcher.errors import EngineError
from launcher.hosts.files import is_the_systems
from launcher.hosts.lock import FOLDERS, LOCK_WAIT_S, NAME, POLL_S, wait_for_lock
from launcher.hosts.runs_folder import replica_user
from launcher.hosts.ssh_connection import SshConnection
from starling.core.errors import UsageError
from starling.core.handover import NOBODYS_ID, STILL

logger = logging.getLogger(__name__)

_SENT = {
    "starling.core.log_lines": starling.core.log_lines,
    "starling.core.files.folder": starling.core.files.folder,
    "starling.core.handover": starling.core.handover,
}
"""Modules sent to a host where the user is root; each imports only those before it."""


def check_remote_runs(connection: SshConnection, runs: Path) -> None:
    """Raise UsageError for a folder that cannot be the runs folder on the host."""
    if is_the_systems((runs,), connection.home):
        raise UsageError(
            f"--runs {runs}: replicas write there; give a folder of its own, for example {runs / 'runs'}"
        )
    # The nearest existing parent must be a folder that the user may write.
    code, place = connection.ask(
        f'p={shlex.quote(str(runs))}; while [ ! -e "$p" ]; do p=$(dirname -- "$p"); done; printf %s "$p"; '
        '[ -d "$p" ] && [ -w "$p" ] && [ -x "$p" ]'
    )
    if code:
        raise UsageError(
            f"--runs {runs}: you may not write in {place} on {connection.name}; give another folder there, or change its owner"
        )


def remote_replica_user(connection: SshConnection, runs: Path, asked: str | None) -> str:
    """Return the `uid:gid` that replicas run as on the host, chosen as `replica_user` does on this machine."""
    if asked is not None or connection.ids[0] != 0:
        return replica_user(runs, connection.ids, asked)
    code, owner = connection.ask(f"stat -L -c %u:%g -- {shlex.quote(str(runs))}")
    uid, _, gid = owner.strip().partition(":")
    if code or not (uid.isdigit() and gid.isdigit()) or int(uid) == 0:
        return f"{NOBODYS_ID}:{NOBODYS_ID}"
    return replica_user(runs, (int(uid), int(gid)), None)


@contextlib.contextmanager
def remote_runs_folder(connection: SshConnection, runs: Path, user: str) -> Iterator[None]:
    """Make the folder there, give it to `user` when root calls, and hold it against every other `up` there.

    If the block fails, a folder made here is removed unless it has contents. Raises EngineError if the folder cannot be
    made, if its owner cannot be changed, or if another `up` holds it for too long.
    """
    quoted = shlex.quote(str(runs))
    new = connection.ask(f"[ -e {quoted} ]")[0] != 0
    if new and connection.ask(f"mkdir -p -- {shlex.quote(str(runs.parent))} && mkdir -m 700 -- {quoted}")[0]:
        raise EngineError(
            f"{runs}: cannot be made on {connection.name}; check the disk and the folder's owner there"
        )
    try:
        if connection.ids[0] == 0 and user:
            _hand_over(connection, runs, user)
        _hold(connection, 9, f"command exec 9<{quoted}", " on this runs folder")
        yield
    except BaseException:
        if new:
            connection.ask(f"rmdir -- {quoted}")
        raise
    finally:
        _let_go(connection, 9)


def _hand_over(connection: SshConnection, runs: Path, user: str) -> None:
    """Give root's files below the folder to the replicas' user, as `hand_over` does it here, by a Python there.

    No shell tool is safe here: each names files by paths, which replicas can swap meanwhile.
    """
    words = " ".join(map(shlex.quote, (str(runs), user)))
    script = base64.b64encode(handover_program().encode()).decode()
    lines: list[str] = []

    def hear(line: str) -> None:
        told = line.removeprefix("starling: ")
        if told.startswith(STILL):
            logger.info(told)
        elif told != line:
            lines.append(told)

    code, _ = connection.ask(
        f"command -v python3 >/dev/null && printf %s {script} | base64 -d | python3 -I -S - {words} 2>&1",
        limit_s=LOCK_WAIT_S,
        heard=hear,
    )
    if code == 0 or (not lines and not _is_roots(connection, runs)):
        for line in lines:
            logger.info(f"note: {line}")
        return
    why = lines[-1] if lines else f"root owns {runs}, and handing it over needs `python3` there, 3.8 or newer"
    raise EngineError(
        f"{connection.name}: {why}; or log in as an ordinary user and name a folder of that user's"
    )


def _is_roots(connection: SshConnection, runs: Path) -> bool:
    return connection.ask(f'[ "$(stat -L -c %u -- {shlex.quote(str(runs))})" = 0 ]')[0] == 0


def handover_program() -> str:
    """Return a program for the standard input of another Python: this version's code that hands a folder over."""
    sources = {name: Path(module.__file__ or "").read_text() for name, module in _SENT.items()}
    return (
        f"import sys, types\nsources = {sources!r}\n"
        "for name in ('starling', 'starling.core', *sources):\n"
        "    sys.modules[name] = module = types.ModuleType(name)\n"
        "    module.__package__ = name.rpartition('.')[0]\n"
        "    exec(compile(sources.get(name, ''), name, 'exec'), module.__dict__)\n"
        "sys.exit(sys.modules['starling.core.handover'].main(sys.argv[1:]))\n"
    )


@contextlib.contextmanager
def remote_host_lock(connection: SshConnection) -> Iterator[Callable[[], None]]:
    """Hold that machine against every other `up`, from here or there; gives the function that releases it before the end."""
    places = " ".join(map(str, FOLDERS))
    chosen = (
        f'for d in {places}; do case $([ -L "$d" ] || stat -c %a "$d") in 1??[2367]) break ;; esac; done; '
        f"f=$d/{NAME}"
    )
    found = (
        f'{chosen}; [ -e "$f" ] || (umask 0333; set -C; : >"$f"); '
        '[ -f "$f" ] && [ ! -L "$f" ] && command exec 8<"$f"'
    )
    _, wrong = connection.ask(
        f'{chosen}; if [ -L "$f" ] || {{ [ -e "$f" ] && [ ! -f "$f" ]; }}; then printf %s "$f"; fi'
    )
    if wrong:
        raise EngineError(
            f"{wrong} on {connection.name}: not a file, and the lock of `launcher up` belongs there; remove it: sudo rm {wrong}"
        )
    try:
        _hold(connection, 8, found, ": one at a time on that machine")
        yield lambda: _let_go(connection, 8)
    finally:
        _let_go(connection, 8)


def _hold(connection: SshConnection, descriptor: int, opening: str, what: str) -> None:
    """Lock what `opening` opens in the shell there: the lock ends with the connection."""
    if connection.ask(f"command -v flock >/dev/null && {{ {opening}; }}")[0]:
        return  # no `flock`, or no file to lock; the engine's unique names still prevent duplicate replicas
    wait_for_lock(
        lambda: connection.ask(f"flock -n {descriptor}")[0] != 1,
        wait=lambda: f"waiting for another `launcher up`{what}",
        give_up=lambda: f"{connection.name}: another `launcher up` holds it; wait for that one, or end it",
        poll_s=2 * POLL_S,
    )


def _let_go(connection: SshConnection, descriptor: int) -> None:
    with contextlib.suppress(EngineError):  # a lost connection has released the lock
        connection.ask(f"exec {descriptor}<&-")
