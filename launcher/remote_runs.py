"""The runs folder of a machine behind ssh: checked, made and held there, as `runs_folder` does it here."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launcher.box import Box
from launcher.errors import EngineError, UsageError
from launcher.inventory import Gpu
from launcher.runs_folder import LOCK_WAIT_S, NOBODYS_ID, RUNS_NEVER

_GPU_FIELDS = "index,uuid,name,memory.total"


def check_remote_runs(box: Box, runs: Path) -> None:
    """Raise UsageError for a folder that cannot be the runs folder there."""
    if str(runs) in RUNS_NEVER or runs == box.home:
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


def remote_replica_user(box: Box, runs: Path, asked: str | None) -> str:
    """Return the `uid:gid` that replicas run as there, as `replica_user` chooses it here."""
    from launcher.runs_folder import replica_user

    if asked is not None or box.ids[0] != 0:
        return replica_user(runs, box.ids, asked)
    quoted = shlex.quote(str(runs))
    code, owner = box.ask(f'[ -n "$(ls -A -- {quoted})" ] && stat -c %u:%g -- {quoted}')
    return f"{NOBODYS_ID}:{NOBODYS_ID}" if code else owner.strip()


@contextlib.contextmanager
def remote_runs_folder(box: Box, runs: Path, user: str, say: Callable[[str], None]) -> Iterator[None]:
    """Make the folder there, give it to `user` when root calls, and hold it against every other `up` there.

    A folder made here is removed again when the block fails and left nothing in it. Raises EngineError when it cannot
    be made, or another `up` holds it for too long.
    """
    quoted = shlex.quote(str(runs))
    new = box.ask(f"[ -e {quoted} ]")[0] != 0
    if box.ask(f"mkdir -p -- {quoted}")[0]:
        raise EngineError(
            f"{runs}: cannot be made on {box.name}; check the disk and the folder's owner there"
        )
    try:
        if box.ids[0] == 0 and user and not user.startswith("0:"):
            # Only root's own files change hands; -h and -P: a link is never followed.
            box.ask(
                f'[ "$(stat -c %u -- {quoted})" = 0 ] && find -P {quoted} -user 0 -exec chown -h {user} -- {{}} +'
            )
        _hold(box, runs, say)
        yield
    except BaseException:
        if new:
            box.ask(f"rmdir -- {quoted}")
        raise
    finally:
        with contextlib.suppress(EngineError):
            box.ask("exec 9<&-")


def _hold(box: Box, runs: Path, say: Callable[[str], None]) -> None:
    """Lock the folder by a descriptor of the shell there: the lock ends with the connection."""
    if box.ask(f"command -v flock >/dev/null && command exec 9<{shlex.quote(str(runs))}")[0]:
        return  # no `flock` there; the engine's names still keep replicas single
    deadline = time.monotonic() + LOCK_WAIT_S
    told = False
    while box.ask("flock -n 9")[0] == 1:
        if time.monotonic() > deadline:
            raise EngineError(f"{runs}: another `launcher up` holds it; wait for that one, or end it")
        if not told:
            say("waiting for another `launcher up` on this runs folder")
            told = True
        time.sleep(0.2)


def remote_gpus(box: Box) -> tuple[Gpu, ...] | None:
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
