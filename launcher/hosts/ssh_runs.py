"""The runs folder of a machine behind ssh: checked, made and held there, as `runs_folder` does it here."""

from __future__ import annotations

import base64
import contextlib
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import starling.core.folder
import starling.core.handover
from launcher.devices.inventory import Gpu
from launcher.errors import EngineError
from launcher.hosts.host_paths import is_the_systems
from launcher.hosts.lock import FOLDERS, NAME
from launcher.hosts.lock_wait import LOCK_WAIT_S, POLL_S, wait_for_lock
from launcher.hosts.runs_folder import replica_user
from launcher.hosts.ssh_connection import SshConnection
from starling.core.errors import UsageError
from starling.core.handover import NOBODYS_ID, STILL

_SENT = {"starling.core.folder": starling.core.folder, "starling.core.handover": starling.core.handover}
"""What is sent to a machine where root logs in, in the order in which each needs those before."""

_GPU_FIELDS = "index,uuid,name,memory.total"


def check_remote_runs(box: SshConnection, runs: Path) -> None:
    """Raise UsageError for a folder that cannot be the runs folder there."""
    if is_the_systems((runs,), box.home):
        raise UsageError(
            f"--runs {runs}: replicas write there; give a folder of its own, for example {runs / 'runs'}"
        )
    # The nearest parent that is there must be a folder that the user may write.
    code, place = box.ask(
        f'p={shlex.quote(str(runs))}; while [ ! -e "$p" ]; do p=$(dirname -- "$p"); done; printf %s "$p"; '
        '[ -d "$p" ] && [ -w "$p" ] && [ -x "$p" ]'
    )
    if code:
        raise UsageError(
            f"--runs {runs}: you may not write in {place} on {box.name}; give another folder there, or change its owner"
        )


def remote_replica_user(box: SshConnection, runs: Path, asked: str | None) -> str:
    """Return the `uid:gid` that replicas run as there, as `replica_user` chooses it here."""
    if asked is not None or box.ids[0] != 0:
        return replica_user(runs, box.ids, asked)
    code, owner = box.ask(f"stat -L -c %u:%g -- {shlex.quote(str(runs))}")
    uid, _, gid = owner.strip().partition(":")
    if code or not (uid.isdigit() and gid.isdigit()) or int(uid) == 0:
        return f"{NOBODYS_ID}:{NOBODYS_ID}"
    return replica_user(runs, (int(uid), int(gid)), None)


@contextlib.contextmanager
def remote_runs_folder(
    box: SshConnection, runs: Path, user: str, say: Callable[[str], None]
) -> Iterator[None]:
    """Make the folder there, give it to `user` when root calls, and hold it against every other `up` there.

    A folder made here is removed again when the block fails and left nothing in it. Raises EngineError when it cannot
    be made or given away, or another `up` holds it for too long.
    """
    quoted = shlex.quote(str(runs))
    new = box.ask(f"[ -e {quoted} ]")[0] != 0
    if new and box.ask(f"mkdir -p -- {shlex.quote(str(runs.parent))} && mkdir -m 700 -- {quoted}")[0]:
        raise EngineError(
            f"{runs}: cannot be made on {box.name}; check the disk and the folder's owner there"
        )
    try:
        if box.ids[0] == 0 and user:
            _hand_over(box, runs, user, say)
        _hold(box, 9, f"command exec 9<{quoted}", " on this runs folder", say)
        yield
    except BaseException:
        if new:
            box.ask(f"rmdir -- {quoted}")
        raise
    finally:
        _let_go(box, 9)


def _hand_over(box: SshConnection, runs: Path, user: str, say: Callable[[str], None]) -> None:
    """Give root's files below the folder to the replicas' user, as `hand_over` does it here, by a Python there.

    No tool of a shell's does it: each names files by their paths, which replicas can swap meanwhile.
    """
    words = " ".join(map(shlex.quote, (str(runs), user)))
    script = base64.b64encode(handover_program().encode()).decode()
    lines: list[str] = []

    def hear(line: str) -> None:
        told = line.removeprefix("starling: ")
        if told.startswith(STILL):
            say(told)
        elif told != line:
            lines.append(told)

    code, _ = box.ask(
        f"command -v python3 >/dev/null && printf %s {script} | base64 -d | python3 -I -S - {words} 2>&1",
        limit_s=LOCK_WAIT_S,
        heard=hear,
    )
    if code == 0 or (not lines and not _is_roots(box, runs)):
        for line in lines:
            say(f"note: {line}")
        return
    why = lines[-1] if lines else f"{runs} is root's, and to hand it over needs `python3` there, 3.8 or newer"
    raise EngineError(f"{box.name}: {why}; or log in as an ordinary user and name a folder of that user's")


def _is_roots(box: SshConnection, runs: Path) -> bool:
    return box.ask(f'[ "$(stat -L -c %u -- {shlex.quote(str(runs))})" = 0 ]')[0] == 0


def handover_program() -> str:
    """Return a program for the standard input of a Python elsewhere: this version's own way to hand a folder over."""
    sources = {name: Path(module.__file__ or "").read_text() for name, module in _SENT.items()}
    return (
        f"import sys, types\nsources = {sources!r}\n"
        "for name in ('starling', 'starling.core', *sources):\n"
        "    sys.modules[name] = module = types.ModuleType(name)\n"
        "    module.__package__ = name.rpartition('.')[0]\n"
        "    exec(compile(sources.get(name, ''), name, 'exec'), module.__dict__)\n"
        "sys.exit(sys.modules['starling.core.handover'].main(sys.argv[1:]))\n"
    )


@dataclass(frozen=True, slots=True)
class RemoteHostLock:
    """A held lock of another machine, which may be given back before its block ends."""

    box: SshConnection

    def release(self) -> None:
        """Let the next one go on; what was started is there to be seen."""
        _let_go(self.box, 8)


@contextlib.contextmanager
def remote_host_lock(box: SshConnection, say: Callable[[str], None]) -> Iterator[RemoteHostLock]:
    """Hold that machine against every other `up`, from here or there, as `host_lock` holds this one."""
    places = " ".join(map(str, FOLDERS))
    chosen = (
        f'for d in {places}; do case $([ -L "$d" ] || stat -c %a "$d") in 1??[2367]) break ;; esac; done; '
        f"f=$d/{NAME}"
    )
    found = (
        f'{chosen}; [ -e "$f" ] || (umask 0333; set -C; : >"$f"); '
        '[ -f "$f" ] && [ ! -L "$f" ] && command exec 8<"$f"'
    )
    _, wrong = box.ask(
        f'{chosen}; if [ -L "$f" ] || {{ [ -e "$f" ] && [ ! -f "$f" ]; }}; then printf %s "$f"; fi'
    )
    if wrong:
        raise EngineError(
            f"{wrong} on {box.name}: not a file, and the lock of `launcher up` is to be there; remove it: sudo rm {wrong}"
        )
    lock = RemoteHostLock(box)
    try:
        _hold(box, 8, found, ": one at a time on that machine", say)
        yield lock
    finally:
        lock.release()


def _hold(box: SshConnection, descriptor: int, opening: str, what: str, say: Callable[[str], None]) -> None:
    """Lock what `opening` opens in the shell there: the lock ends with the connection."""
    if box.ask(f"command -v flock >/dev/null && {{ {opening}; }}")[0]:
        return  # no `flock` there, or nothing to lock; the engine's names still keep replicas single
    wait_for_lock(
        lambda: box.ask(f"flock -n {descriptor}")[0] != 1,
        wait=lambda: f"waiting for another `launcher up`{what}",
        give_up=lambda: f"{box.name}: another `launcher up` holds it; wait for that one, or end it",
        say=say,
        poll_s=2 * POLL_S,
    )


def _let_go(box: SshConnection, descriptor: int) -> None:
    with contextlib.suppress(EngineError):  # a lost connection has let go already
        box.ask(f"exec {descriptor}<&-")


def remote_gpus(box: SshConnection) -> tuple[Gpu, ...] | None:
    """Return the GPUs that `nvidia-smi` lists there; None where it does not answer."""
    code, text = box.ask(f"nvidia-smi --query-gpu={_GPU_FIELDS} --format=csv,noheader,nounits")
    return parse_gpus_csv(text) if code == 0 else None


def parse_gpus_csv(text: str) -> tuple[Gpu, ...] | None:
    """Return the GPUs in nvidia-smi's lines `0, GPU-1a2b, NVIDIA H100, 81559` (MiB); None for other lines."""
    gpus = []
    for line in filter(str.strip, text.splitlines()):
        words = [word.strip() for word in line.split(",")]
        if len(words) < 4 or not words[0].isdigit() or not words[-1].isdigit():
            return None
        gpus.append(
            Gpu(
                index=int(words[0]),
                uuid=words[1],
                name=", ".join(words[2:-1]),
                memory_bytes=int(words[-1]) << 20,
            )
        )
    return tuple(gpus)
