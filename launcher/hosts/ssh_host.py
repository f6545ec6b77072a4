"""A host reached by ssh: one open shell on the host runs all commands."""

from __future__ import annotations

import base64
import contextlib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from launcher.devices.inventory import Gpu
from launcher.hosts.files import DiskSpace
from launcher.hosts.usage import PROC, Usage, files_of, usage_in

if TYPE_CHECKING:
    from launcher.errors import ConnectionLost
    from launcher.hosts.ssh_connection import SshConnection

MOST_STATUS_FILES, MOST_KERNEL_FILES = 24, 1000
"""The most status files and kernel files per command; the longest answer stays below MOST_ANSWER_BYTES."""

_MARK = "=next="
_UNFOLLOWED = "iflag=nofollow,nonblock"
"""Flags of `dd`: follow no link and do not block on a pipe, because replicas write the files."""

_GPU_FIELDS = "index,uuid,name,memory.total"
_OTHER_ENGINES = ("DOCKER_CONTEXT", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH")
"""Variables that would lead a client to another engine, or make it expect a certificate from a socket."""


class Shell(Protocol):
    """The part of a connection that these functions need."""

    def ask(self, script: str) -> tuple[int, str]:
        """Run lines in the host's shell and return their exit code and output."""


class SshHost:
    """A machine reached by ssh. A socket of this machine forwards to its engine's socket."""

    remote = True

    def __init__(self, connection: SshConnection, environment: Mapping[str, str] = os.environ) -> None:
        self._connection = connection
        self.address, self.name = connection.url, connection.name
        self.uid = self.owner = connection.ids[0]
        self.files = SshFiles(connection)
        self.engine_address = f"unix://{connection.docker_socket}"
        kept = {name: value for name, value in environment.items() if name not in _OTHER_ENGINES}
        self.environment: Mapping[str, str] = {**kept, "DOCKER_HOST": self.engine_address}

    def gpus(self) -> tuple[Gpu, ...] | None:
        """Return the GPUs that the host's `nvidia-smi` lists; None if it fails."""
        code, text = self._connection.ask(
            f"nvidia-smi --query-gpu={_GPU_FIELDS} --format=csv,noheader,nounits"
        )
        return parse_gpus_csv(text) if code == 0 else None

    def driver(self) -> None:
        """Return None: the host's driver is not checked."""
        return None

    def disk_space(self, path: Path) -> DiskSpace | None:
        """Return the free bytes at a path that need not exist yet."""
        nearest = f'p={_quote(path)}; while [ ! -e "$p" ]; do p=$(dirname -- "$p"); done'
        code, text = self._connection.ask(f'{nearest}; df -Pk -- "$p" | tail -n 1')
        words = text.split()
        return (
            DiskSpace(int(words[3]) * 1024) if code == 0 and len(words) >= 6 and words[3].isdigit() else None
        )

    def owner_of(self, path: Path) -> int | None:
        """Return the uid of the owner of a folder on the host; None if there is no folder."""
        code, uid = self._connection.ask(f"[ -d {_quote(path)} ] && stat -L -c %u -- {_quote(path)}")
        return int(uid) if code == 0 and uid.strip().isdigit() else None

    def usage(self, pids: Mapping[str, int]) -> dict[str, Usage]:
        """Return the usage of containers from their control groups on the host."""
        return read_usage_there(self._connection, pids)

    def read_status(self, paths: Sequence[Path], most_bytes: int) -> Mapping[Path, bytes] | None:
        """Return the heads of files `<runs>/<folder>/<file>`; None if the host's `dd` would follow links."""
        return read_files_there(self._connection, paths, most_bytes)

    def check_runs(self, runs: Path) -> None:
        """Raise UsageError for a path that cannot be the runs folder on the host."""
        from launcher.hosts.ssh_runs import check_remote_runs

        check_remote_runs(self._connection, runs)

    def replica_user(self, runs: Path, asked: str | None) -> str:
        """Return the `uid:gid` that replicas run as on the host."""
        from launcher.hosts.ssh_runs import remote_replica_user

        return remote_replica_user(self._connection, runs, asked)

    @contextlib.contextmanager
    def hold(self, runs: Path, user: str) -> Iterator[Callable[[], None]]:
        """Make the runs folder there, and hold it and that machine against every other `up`."""
        from launcher.hosts.ssh_runs import remote_host_lock, remote_runs_folder

        with (
            remote_runs_folder(self._connection, runs, user),
            remote_host_lock(self._connection) as release,
        ):
            yield release

    def lost(self) -> ConnectionLost | None:
        """Return the error that says, with ssh's message, why the connection has ended; None if it is open."""
        return self._connection.lost() if self._connection.ended else None


class SshFiles:
    """Files of a machine reached by ssh; as with scp, relative paths start in the home folder."""

    remote = True

    def __init__(self, connection: SshConnection) -> None:
        self._connection = connection
        self.home = self.start = connection.home

    def is_file(self, path: Path) -> bool:
        """Return whether the path is a file that the user may read."""
        return self._holds(f"[ -f {_quote(path)} ] && [ -r {_quote(path)} ]")

    def is_dir(self, path: Path) -> bool:
        """Return whether the path is a folder."""
        return self._holds(f"[ -d {_quote(path)} ]")

    def exists(self, path: Path) -> bool:
        """Return whether the path is a folder, or a file that the user may read."""
        return self.is_dir(path) or self.is_file(path)

    def expand(self, base: Path, given: str) -> Path:
        """Return `given` below `base`, or `given` if it is absolute, with `~` replaced and links kept."""
        path = Path(given)
        if path.parts and path.parts[0] == "~":
            path = self.home.joinpath(*path.parts[1:])
        return Path(os.path.normpath(base / path))

    def real(self, path: Path) -> Path:
        """Return the path with every link followed; the unchanged path if the machine cannot resolve it."""
        code, text = self._connection.ask(f"readlink -f -- {_quote(path)}")
        return Path(text.removesuffix("\n")) if code == 0 and text.startswith("/") else path

    def read(self, path: Path, most_bytes: int) -> bytes:
        """Return the head of a file; raises OSError."""
        code, text = self._connection.ask(
            f"[ -f {_quote(path)} ] && [ -r {_quote(path)} ] && head -c {most_bytes:d} -- {_quote(path)} | base64"
        )
        if code:
            raise OSError(0, f"no readable file on {self._connection.name}", str(path))
        return base64.b64decode(text)

    def _holds(self, test: str) -> bool:
        return self._connection.ask(test)[0] == 0


def read_files_there(shell: Shell, paths: Sequence[Path], most_bytes: int) -> dict[Path, bytes] | None:
    """Return the heads of the host's files, empty if not a file; None if the host's `dd` cannot refuse links."""
    if shell.ask(f"dd if=/dev/null {_UNFOLLOWED}")[0]:
        return None
    commands = [
        f"({_enter(path.parent)} && dd if=./{_quote(Path(path.name))} {_UNFOLLOWED} bs={most_bytes:d} count=1) | base64"
        for path in paths
    ]
    texts = _outputs(shell, commands, MOST_STATUS_FILES)
    return {path: base64.b64decode(text) for path, text in zip(paths, texts, strict=True)}


def read_usage_there(shell: Shell, pids: Mapping[str, int]) -> dict[str, Usage]:
    """Return the usage of the host's containers by id, from the control groups of their first processes.

    The engine needs one request per container, and a second to answer each.
    """
    known = {key: pid for key, pid in pids.items() if pid}
    groups = _outputs(shell, [f"cat {PROC}/{pid:d}/cgroup" for pid in known.values()], MOST_KERNEL_FILES)
    listed = dict(zip(known, groups, strict=True))
    files = [file for key, text in listed.items() for file in files_of(text, key)]
    moment, *texts = _outputs(
        shell, ["date +%s%N", *(f"cat {_quote(file)}" for file in files)], MOST_KERNEL_FILES
    )
    read = dict(zip(files, texts, strict=True)).__getitem__
    clock = int(moment) / 1e9 if moment.strip().isdigit() else None
    found = {key: usage_in(text, key, read) for key, text in listed.items()}
    return {key: replace(usage, clock=clock) for key, usage in found.items() if usage is not None}


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


def _outputs(shell: Shell, commands: Sequence[str], at_once: int) -> list[str]:
    """Return the output of each command."""
    texts: list[str] = []
    for start in range(0, len(commands), at_once):
        lines = [f"printf '%s\\n' {_MARK}; {command}" for command in commands[start : start + at_once]]
        texts += shell.ask("\n".join(lines))[1].split(f"{_MARK}\n")[1:]
    return texts


def _enter(folder: Path) -> str:
    """Return shell commands that enter a folder, and fail if the folder itself is a link.

    A rename does not change the working directory once it is entered; `pwd -P` prints its real path.
    """
    above, name = _quote(folder.parent), _quote(Path(folder.name))
    return (
        f'cd -P -- {above} && above=$(pwd -P) && cd -P -- ./{name} && [ "$(pwd -P)" = "${{above%/}}"/{name} ]'
    )


def _quote(path: Path) -> str:
    return shlex.quote(str(path))
