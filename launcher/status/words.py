"""A replica's state and its device in words."""

from __future__ import annotations

from launcher.engines.base import ReplicaState
from starling.core.errors import Exit
from starling.core.units import format_size

_EXITS = {
    Exit.ERROR: "error",
    Exit.USAGE: "usage or configuration error",
    Exit.DATA: "data error",
    Exit.CHECKPOINT: "checkpoint error",
    Exit.SERVICE: "engine error",
    Exit.DISK_FULL: "disk full",
    Exit.GPU_LOST: "GPU lost",
    127: "command not found",
}


def words_for(state: ReplicaState) -> str:
    """Return a replica's state in words.

    Out of memory is taken from the engine's flag, never guessed from exit code 137, which `docker kill` also gives.
    The flag is also set if only a child was killed, with any exit code of PID 1.
    """
    limit = f" at {format_size(state.memory_bytes)}" if state.memory_bytes else ""
    if state.phase == "created":
        return "created, never started"
    if state.live:
        flag = f", a child was OOM-KILLED{limit}" if state.oom_killed else ""
        return ("paused" if state.phase == "paused" else "running") + flag
    code = state.exit_code
    if state.oom_killed:
        ended = "exited 0 nevertheless" if code == 0 else f"exited {code}"
        return f"OOM-KILLED{limit}" if code == 137 else f"a child was OOM-KILLED{limit}, {ended}"
    if code == 0:
        return "finished"
    if code in (130, 143):
        return f"stopped {code}: resumable"
    if code == 137:
        return "killed (137)"
    if code == 255:
        return "lost with the engine or the machine (255)"
    if code is not None and 128 < code < 160:
        return f"killed by signal {code - 128}"
    return f"exited {code}: {_EXITS.get(code if code is not None else 1, 'error')}"


def device_words(label: str) -> str:
    """Return `GPU 3` for `gpu:3`."""
    kind, _, number = label.partition(":")
    return f"{kind.upper()} {number}"
