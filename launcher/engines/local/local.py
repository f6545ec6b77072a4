"""Replicas as processes of this machine, for machines without Docker.

Below the runs folder, `.launcher/<replica>.json` records a replica, `.exit.json` its exit code, `.log` its output.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from launcher.devices.holders import GpuHolder
from launcher.devices.inventory import Machine
from launcher.engines.base import Image, LogLine, ReplicaSpec, ReplicaState
from launcher.engines.labels import (
    DEVICE_LABEL,
    FLEET_LABEL,
    REPLICA_LABEL,
    in_use_by,
    is_ours,
    labels,
    plan_of,
)
from launcher.engines.local import memory_limit, supervisor
from launcher.engines.local.log import read_log
from launcher.errors import EngineError, NameTaken, disk_full
from launcher.hosts.this_machine import ThisMachine
from launcher.hosts.usage import Usage, read_sessions
from starling.core.errors import UsageError
from starling.core.files.folder import Folder
from starling.core.plain_json import parse_json
from starling.core.process import boot_id, stat_of

FOLDER = ".launcher"
MOST_RECORD_BYTES = 4 * 1024**2


@dataclass(frozen=True, slots=True)
class _Record:
    """The contents of `.launcher/<replica>.json`."""

    id: str
    labels: Mapping[str, str]
    created: float
    boot: str = ""
    pid: int = 0
    start_time: int = 0
    started: float | None = None


class LocalEngine:
    """Replicas as processes, each in its own session. Records hold pid, start time and boot, to detect a reused pid."""

    name = "local"

    def __init__(
        self, runs: Path, owner: int, new_id: Callable[[], str] = lambda: secrets.token_hex(8)
    ) -> None:
        self.host = ThisMachine()
        self._folder = runs / FOLDER
        self._runs = runs
        self._owner = owner
        self._new_id = new_id
        self._specs: dict[str, ReplicaSpec] = {}

    def machine(self) -> Machine:
        """Return the cores that this process may use, and the machine's memory."""
        return Machine(
            cores=tuple(sorted(os.sched_getaffinity(0))), memory_bytes=psutil.virtual_memory().total
        )

    def resolve_image(self, image: str) -> Image:
        """Return the empty image: processes need no image."""
        return Image()

    def check_trainer(self, image: Image, script: str) -> None:
        """Accept every image: `check_local_trainer` has found the trainer."""

    def check_gpu_runtime(self, image: Image) -> None:
        """Accept every image: processes reach GPUs without a runtime."""

    def check_network(self, network: str) -> None:
        """Raise UsageError for a network: processes use the host's network."""
        if network not in ("", "bridge"):
            raise UsageError(
                f"--network {network}: only containers have networks; leave it out with --engine local"
            )

    def check_names(self, names: Sequence[str]) -> None:
        """Raise NameTaken if another owner's record has one of these names."""
        with self._opened() as folder:
            for name in names:
                record = self._own(folder, name)
                if folder is not None and folder.has(f"{name}.json") and record is None:
                    raise self._name_taken(name)

    def create(self, spec: ReplicaSpec) -> str:
        """Record a replica; raises NameTaken if a record of this name exists."""
        record = _Record(id=self._new_id(), labels=labels(spec, self._owner), created=time.time())
        temporary = f".{spec.name}.{record.id}.part"
        with _translated(self._folder), self._written(temporary, _dump(record)) as folder:
            try:
                # A link fails if the name exists, unlike a rename: only one creator gets the name.
                os.link(
                    temporary,
                    f"{spec.name}.json",
                    src_dir_fd=folder.descriptor,
                    dst_dir_fd=folder.descriptor,
                    follow_symlinks=False,
                )
            except FileExistsError:
                raise self._name_taken(spec.name) from None
            finally:
                _unlink(folder, temporary)
            _unlink(folder, f"{spec.name}.exit.json")
        self._specs[record.id] = spec
        return record.id

    def start(self, replica_id: str) -> None:
        """Run the replica under a supervisor in a session of its own; only the engine object that created it can."""
        spec = self._specs.get(replica_id)
        record = self._find(replica_id)
        if spec is None or record is None:
            raise EngineError(f"replica {replica_id} was not created by this command; run `up` again")
        with _translated(self._folder):
            done = subprocess.run(
                [
                    *(sys.executable, "-I", supervisor.__file__),
                    str(self._exit_path(spec.name)),
                    str(self._log_path(spec.name)),
                    ",".join(map(str, spec.cores)),
                    str(spec.memory_bytes),
                    *("--", *spec.command),
                ],
                capture_output=True,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **spec.passed, **spec.environment},
                cwd=self._runs,
                text=True,
                check=False,
            )
            try:
                pid, start_time = map(int, done.stdout.split())
            except ValueError:
                raise EngineError(f"{spec.name}: could not start: {done.stderr.strip()[-300:]}") from None
            running = _Record(
                id=record.id,
                labels=record.labels,
                created=record.created,
                boot=boot_id(),
                pid=pid,
                start_time=start_time,
                started=time.time(),
            )
            temporary = f".{spec.name}.{record.id}.part"
            with self._written(temporary, _dump(running)) as folder:
                os.replace(
                    temporary,
                    f"{spec.name}.json",
                    src_dir_fd=folder.descriptor,
                    dst_dir_fd=folder.descriptor,
                )

    def list(self) -> list[ReplicaState]:
        """Return this owner's replicas of the runs folder."""
        states = [self._describe(record) for record in self._records()]
        return sorted(states, key=lambda state: (state.fleet, len(state.device), state.device, state.name))

    def gpu_holders(self) -> Sequence[GpuHolder]:
        """Return no holders: running replicas are found among the machine's processes, for every runs folder.

        A replica that never started holds no GPU, because only its creator can start it.
        """
        return []

    def state(self, replica_id: str) -> ReplicaState | None:
        """Return a replica's state from its record, its process and its exit file."""
        record = self._find(replica_id)
        return None if record is None else self._describe(record)

    def environment(self, replica_id: str) -> Mapping[str, str] | None:
        """Return a running replica's environment; None after its end."""
        record = self._find(replica_id)
        if record is None or not _alive(record):
            return None
        try:
            raw = Path(f"/proc/{record.pid}/environ").read_bytes()
        except OSError:
            return None
        return dict(item.split("=", 1) for item in os.fsdecode(raw).split("\0") if "=" in item)

    def usage(self, states: Sequence[ReplicaState]) -> Mapping[str, Usage]:
        """Return the usage of each running replica's session."""
        sessions = {state.pid: state.id for state in states if state.live and state.pid}
        return {sessions[pid]: usage for pid, usage in read_sessions(sessions).items()} if sessions else {}

    def logs(
        self, replica_id: str, *, follow: bool = False, tail: int | None = None, since: float | None = None
    ) -> Iterator[LogLine]:
        """Yield lines of the log and its rotated predecessors; with `follow`, until the replica has ended."""
        record = self._find(replica_id)
        if record is not None:
            path = self._log_path(record.labels[REPLICA_LABEL])
            yield from read_log(path, lambda: _alive(record), follow=follow, tail=tail, since=since)

    def terminate(self, replica_id: str) -> None:
        """Send SIGTERM to the supervisor, which passes the signal to the trainer."""
        record = self._find(replica_id)
        if record is not None and _alive(record):
            with _translated(self._folder), contextlib.suppress(ProcessLookupError):
                os.kill(record.pid, signal.SIGTERM)

    def kill(self, replica_id: str) -> None:
        """Send SIGKILL to the supervisor and all of its descendants.

        A training on several devices runs each process in its own session, which a signal to the group does not reach.
        """
        record = self._find(replica_id)
        if record is not None and _alive(record):
            strays = memory_limit.session_of(record.pid)
            with _translated(self._folder), contextlib.suppress(ProcessLookupError):
                os.killpg(record.pid, signal.SIGKILL)
            for pid in strays:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)

    def remove(self, replica_id: str) -> None:
        """Kill the replica, and delete its record, its log, and the folder once it is empty."""
        record = self._find(replica_id)
        if record is None:
            return
        self.kill(replica_id)
        deadline = time.monotonic() + 5
        while _alive(record) and time.monotonic() < deadline:
            time.sleep(0.02)
        if record.pid and (
            cgroup := memory_limit.find_cgroup(supervisor.cgroup_name(record.pid, record.start_time))
        ):
            memory_limit.remove_cgroup(cgroup)  # a killed supervisor could not remove it
        name = record.labels[REPLICA_LABEL]
        ending = f"{name}.exit.json"
        older = (f"{name}.log.{number}" for number in range(1, supervisor.LOG_FILES))
        with _translated(self._folder), Folder.resolve(self._runs) as top:
            with self._opened() as folder:
                for file in (ending, supervisor.unfinished(ending), f"{name}.log", *older, f"{name}.json"):
                    if folder is not None:
                        _unlink(folder, file)
            with contextlib.suppress(OSError):
                os.rmdir(FOLDER, dir_fd=top.descriptor)
        self._specs.pop(replica_id, None)

    def _name_taken(self, name: str) -> NameTaken:
        with self._opened() as folder:
            record = folder and _load(folder, f"{name}.json")
        if record and not is_ours(record.labels, name, self._owner) and in_use_by(record.labels, name):
            return NameTaken(in_use_by(record.labels, name))
        return NameTaken(
            f"{name}: this name is held by {self._folder / name}.json; give the training another --name, or move that file away"
        )

    def read_file(self, replica_id: str, path: str, most_bytes: int) -> bytes:
        """Return a file of this machine: processes see the host's files."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb") as file:
                about = os.fstat(descriptor)
                plain = stat.S_ISREG(about.st_mode) and about.st_size <= most_bytes
                return file.read() if plain and self._find(replica_id) is not None else b""
        except OSError:
            return b""

    def _records(self) -> Iterator[_Record]:
        with self._opened() as folder:
            for file in folder.names() if folder is not None else ():
                if file.endswith(".json") and not file.endswith(".exit.json"):
                    record = self._own(folder, file.removesuffix(".json"))
                    if record is not None:
                        yield record

    def _own(self, folder: Folder | None, name: str) -> _Record | None:
        """Return the record of this name if its labels and the file's owner show that it is this owner's.

        Every user with write access to the runs folder can forge a record in another user's name.
        """
        record = _load(folder, f"{name}.json", self._writers) if folder is not None else None
        return record if record and is_ours(record.labels, name, self._owner) else None

    @property
    def _writers(self) -> frozenset[int]:
        return frozenset({0, os.getuid(), self._owner})

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Folder | None]:
        """Open the folder of records without following links below the runs folder; None if it does not exist."""
        with contextlib.ExitStack() as held:
            folder = None
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                folder = held.enter_context(held.enter_context(Folder.resolve(self._runs)).folder(FOLDER))
            yield folder

    @contextlib.contextmanager
    def _written(self, file: str, text: str) -> Iterator[Folder]:
        """Write a new file and yield its folder; retries if another command removes the empty folder meanwhile."""
        for attempt in range(10):
            with Folder.resolve(self._runs, create=True) as top, top.folder(FOLDER, create=True) as folder:
                try:
                    descriptor = folder.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                except FileNotFoundError:
                    if attempt == 9:
                        raise
                    continue
                with open(descriptor, "w", encoding="utf-8") as written:
                    written.write(text)
                yield folder
                return

    def _find(self, replica_id: str) -> _Record | None:
        return next((record for record in self._records() if record.id == replica_id), None)

    def _describe(self, record: _Record) -> ReplicaState:
        alive = _alive(
            record
        )  # check this before reading the exit file, which the supervisor writes just before its end
        name = record.labels[REPLICA_LABEL]
        code, oom_killed = None, False
        if record.pid and not alive:
            with self._opened() as folder, contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                ended = parse_json(_read(folder, f"{name}.exit.json", self._writers) if folder else "")
                code, oom_killed = int(ended["exit_code"]), bool(ended["oom_killed"])
        plan = plan_of(record.labels) or {}
        return ReplicaState(
            id=record.id,
            name=name,
            fleet=record.labels[FLEET_LABEL],
            device=record.labels[DEVICE_LABEL],
            phase="created" if not record.pid else "running" if alive else "exited",
            # A supervisor without an exit file was killed, and the kernel killed its child too.
            exit_code=None if not record.pid or alive else 137 if code is None else code,
            oom_killed=oom_killed,
            memory_bytes=int(plan.get("memory_bytes", 0)),
            started_at=record.started,
            pid=record.pid if alive else 0,
            plan=plan,
        )

    def _exit_path(self, name: str) -> Path:
        return self._folder / f"{name}.exit.json"

    def _log_path(self, name: str) -> Path:
        return self._folder / f"{name}.log"


def _alive(record: _Record) -> bool:
    """Return whether the recorded process still runs: same boot, same pid, same start time.

    The process must also be a supervisor: replicas can write below the runs folder, and a forged record must not point
    at another process. A zombie has no command line, so it counts as ended.
    """
    if not record.pid or record.boot != boot_id():
        return False
    try:
        words = Path(f"/proc/{record.pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    stat = stat_of(record.pid)
    return os.fsencode(supervisor.__file__) in words and stat is not None and stat.start == record.start_time


def _dump(record: _Record) -> str:
    return json.dumps({name: getattr(record, name) for name in _Record.__dataclass_fields__})


def _load(folder: Folder, file: str, writers: Collection[int] | None = None) -> _Record | None:
    """Return the record in a file; None for a malformed file, or a file that belongs to none of the `writers`."""
    try:
        values: Any = parse_json(_read(folder, file, writers))
        record = _Record(**values)
        whole = (
            all(isinstance(text, str) for text in (record.id, record.boot))
            and all(type(number) is int for number in (record.pid, record.start_time))
            and isinstance(record.created, (int, float))
            and isinstance(record.started, (int, float, type(None)))
            and isinstance(record.labels, dict)
            and all(isinstance(text, str) for text in record.labels.values())
        )
        return record if whole and record.pid >= 0 and record.pid != 1 else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _read(folder: Folder, file: str, writers: Collection[int] | None) -> bytes:
    """Return the bytes of a regular file, up to a limit; raises OSError, or ValueError for anything else."""
    with open(folder.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as opened:
        state = os.fstat(opened.fileno())
        if not stat.S_ISREG(state.st_mode) or (writers is not None and state.st_uid not in writers):
            raise ValueError(f"{file}: is no record")
        return opened.read(MOST_RECORD_BYTES)


def _unlink(folder: Folder, file: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(file, dir_fd=folder.descriptor)


@contextlib.contextmanager
def _translated(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_full(error) or EngineError(
            f"{error.filename or folder}: {error.strerror or error}; check the permissions of the runs folder"
        ) from error
