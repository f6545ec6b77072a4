"""What replicas of a machine behind ssh say and use: a question to its shell for all of them.

The engine there would have to be asked about each, and takes a second to tell what one uses.
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from launcher.engines.base import ReplicaState, Usage
from launcher.engines.docker.cgroups import PROC, files_of, usage_in

MOST_TOLD, MOST_SMALL = 24, 1000
"""Files a question, of those that replicas write and of the kernel's: the longest answer is still accepted."""

_MARK = "=next="
_UNFOLLOWED = "iflag=nofollow,nonblock"
"""Replicas write what they tell: a link is not followed, and a pipe is not waited for."""


class Shell(Protocol):
    """What is asked of a box."""

    def ask(self, script: str) -> tuple[int, str]:
        """Run lines in the shell there and return their exit code and output."""


def read_told(shell: Shell, paths: Sequence[Path], most_bytes: int) -> dict[Path, bytes] | None:
    """Return the heads of files there, empty for what is no file; None where `dd` there cannot leave links alone."""
    if shell.ask(f"dd if=/dev/null {_UNFOLLOWED}")[0]:
        return None
    commands = [
        f"({_enter(path.parent)} && dd if=./{_quote(Path(path.name))} {_UNFOLLOWED} bs={most_bytes:d} count=1) | base64"
        for path in paths
    ]
    texts = _outputs(shell, commands, MOST_TOLD)
    return {path: base64.b64decode(text) for path, text in zip(paths, texts, strict=True)}


def read_groups(shell: Shell, states: Iterable[ReplicaState]) -> dict[str, Usage]:
    """Return by id what running replicas use, from their control groups there."""
    live = [state for state in states if state.live and state.pid]
    groups = _outputs(shell, [f"cat {PROC}/{state.pid:d}/cgroup" for state in live], MOST_SMALL)
    files = [file for state, text in zip(live, groups, strict=True) for file in files_of(text, state.id)]
    moment, *texts = _outputs(shell, ["date +%s%N", *(f"cat {_quote(file)}" for file in files)], MOST_SMALL)
    read = dict(zip(files, texts, strict=True)).__getitem__
    clock = int(moment) / 1e9 if moment.strip().isdigit() else None
    found = {state.id: usage_in(text, state.id, read) for state, text in zip(live, groups, strict=True)}
    return {key: replace(usage, clock=clock) for key, usage in found.items() if usage is not None}


def _outputs(shell: Shell, commands: Sequence[str], at_once: int) -> list[str]:
    """Return what each command prints."""
    texts: list[str] = []
    for start in range(0, len(commands), at_once):
        lines = [f"printf '%s\\n' {_MARK}; {command}" for command in commands[start : start + at_once]]
        texts += shell.ask("\n".join(lines))[1].split(f"{_MARK}\n")[1:]
    return texts


def _enter(folder: Path) -> str:
    """Return the words that make a folder the working directory, unless its own name is a link by then.

    A working directory stays what it is, whatever is renamed meanwhile; the kernel says where it really is.
    """
    above, name = _quote(folder.parent), _quote(Path(folder.name))
    return (
        f'cd -P -- {above} && above=$(pwd -P) && cd -P -- ./{name} && [ "$(pwd -P)" = "${{above%/}}"/{name} ]'
    )


def _quote(path: Path) -> str:
    return shlex.quote(str(path))
