"""Replicas as processes of this machine: the same plan where there is no Docker.

Below the runs folder, `.launcher/<replica>.json` records a replica, `.exit.json` how it ended, `.log` what it said.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from launcher.claims import Claim
from launcher.engines import supervisor
from launcher.engines.base import Image, ReplicaSpec, ReplicaState
from launcher.errors import EngineError, NameTaken, UsageError
from launcher.inventory import Machine
from launcher.ownership import DEVICE_LABEL, FLEET_LABEL, REPLICA_LABEL, is_ours, labels, plan_of

FOLDER = ".launcher"
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class _Record:
    """What `.launcher/<replica>.json` holds."""

    id: str
    labels: Mapping[str, str]
    created: float
    boot: str = ""
    pid: int = 0
    start_time: int = 0
    started: float | None = None


class LocalEngine:
    """Processes in sessions of their own, recorded by pid, start time and boot, so that a reused pid is never hit."""

    name = "local"
    remote = False

    def __init__(
        self, runs: Path, owner: int, new_id: Callable[[], str] = lambda: secrets.token_hex(8)
    ) -> None:
        self._folder = runs / FOLDER
        self._runs = runs
        self._owner = owner
        self._new_id = new_id
        self._specs: dict[str, ReplicaSpec] = {}

    def machine(self) -> Machine:
        """Return the cores this process may use, and the machine's memory."""
        return Machine(
            cores=tuple(sorted(os.sched_getaffinity(0))), memory_bytes=psutil.virtual_memory().total
        )

    def resolve_image(self, image: str) -> Image:
        """Return the empty image: processes need none."""
        return Image()

    def check_trainer(self, image: Image, script: str) -> None:
        """Take it: `trainer_script` has found the trainer."""

    def check_gpu_runtime(self, image: Image) -> None:
        """Take it: processes reach GPUs without a runtime."""

    def check_network(self, network: str) -> None:
        """Raise UsageError for a network: processes are on the host's."""
        if network not in ("", "bridge"):
            raise UsageError(
                f"--network {network}: only containers have networks; leave it out with --engine local"
            )

    def create(self, spec: ReplicaSpec) -> str:
        """Record a replica; raises NameTaken when its record is there."""
        record = _Record(id=self._new_id(), labels=labels(spec, self._owner), created=time.time())
        with _translated(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary = self._folder / f".{spec.name}.{record.id}.part"
            temporary.write_text(_dump(record))
            try:
                # A link fails where a rename would replace: the name is taken by one creator only.
                os.link(temporary, self._record_path(spec.name))
            except FileExistsError:
                raise NameTaken(
                    f"{spec.name}: this name is held by {self._record_path(spec.name)}; "
                    "give the training another --name, or move that file away"
                ) from None
            finally:
                temporary.unlink()
            self._exit_path(spec.name).unlink(missing_ok=True)
        self._specs[record.id] = spec
        return record.id

    def start(self, replica_id: str) -> None:
        """Run the replica under a supervisor that leaves this session; only its creator can."""
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
                boot=_boot_id(),
                pid=pid,
                start_time=start_time,
                started=time.time(),
            )
            temporary = self._folder / f".{spec.name}.{record.id}.part"
            temporary.write_text(_dump(running))
            os.replace(temporary, self._record_path(spec.name))

    def list(self) -> list[ReplicaState]:
        """Return this owner's replicas below the runs folder."""
        states = [self._describe(record) for record in self._records()]
        return sorted(states, key=lambda state: (state.fleet, len(state.device), state.device, state.name))

    def claims(self) -> Sequence[Claim]:
        """Return nothing: who runs shows in the machine's processes, whatever runs folder they are recorded in.

        A replica that was recorded and never started holds nothing, as only its creator can start it.
        """
        return []

    def state(self, replica_id: str) -> ReplicaState | None:
        """Return a replica as its record, its process and its exit file tell."""
        record = self._find(replica_id)
        return None if record is None else self._describe(record)

    def environment(self, replica_id: str) -> Mapping[str, str] | None:
        """Return a running replica's environment; None afterwards."""
        record = self._find(replica_id)
        if record is None or not _alive(record):
            return None
        try:
            raw = Path(f"/proc/{record.pid}/environ").read_bytes()
        except OSError:
            return None
        return dict(item.split("=", 1) for item in os.fsdecode(raw).split("\0") if "=" in item)

    def logs(self, replica_id: str, *, follow: bool = False, tail: int | None = None) -> Iterator[str]:
        """Yield lines of the log; with `follow`, until the replica has ended. Rotation is followed too."""
        record = self._find(replica_id)
        if record is None:
            return
        path = self._log_path(record.labels[REPLICA_LABEL])
        while not path.exists():
            if not (follow and _alive(record)):
                return
            time.sleep(POLL_S)
        file = path.open("rb")
        try:
            lines = file.read().split(b"\n")
            pending = lines.pop()
            if tail is not None:  # an unfinished last line is one of them
                lines = lines[max(0, len(lines) + bool(pending) - tail) :]
            yield from map(_text, lines)
            while follow:
                ended = not _alive(record)  # asked before reading, so that the last words are read too
                *lines, pending = (pending + file.read()).split(b"\n")
                yield from map(_text, lines)
                if ended:
                    break
                if not lines:
                    with contextlib.suppress(OSError):
                        if os.stat(path).st_ino != os.fstat(file.fileno()).st_ino:
                            file.close()
                            file = path.open("rb")
                    time.sleep(POLL_S)
            if pending:
                yield _text(pending)
        finally:
            file.close()

    def terminate(self, replica_id: str) -> None:
        """Send SIGTERM to the supervisor, which passes it on to the trainer."""
        record = self._find(replica_id)
        if record is not None and _alive(record):
            with _translated(self._folder), contextlib.suppress(ProcessLookupError):
                os.kill(record.pid, signal.SIGTERM)

    def kill(self, replica_id: str) -> None:
        """Send SIGKILL to the supervisor and all that it has started.

        The processes of a training on several devices are in sessions of their own, where no signal to a group reaches.
        """
        record = self._find(replica_id)
        if record is not None and _alive(record):
            family: list[psutil.Process] = []
            with contextlib.suppress(psutil.NoSuchProcess):
                family = psutil.Process(record.pid).children(recursive=True)
            with _translated(self._folder), contextlib.suppress(ProcessLookupError):
                os.killpg(record.pid, signal.SIGKILL)
            for process in family:
                with contextlib.suppress(psutil.Error):
                    process.kill()

    def remove(self, replica_id: str) -> None:
        """Kill the replica, and delete its record and log; the folder too, once it is empty."""
        record = self._find(replica_id)
        if record is None:
            return
        self.kill(replica_id)
        deadline = time.monotonic() + 5
        while _alive(record) and time.monotonic() < deadline:
            time.sleep(0.02)
        name = record.labels[REPLICA_LABEL]
        log = self._log_path(name)
        with _translated(self._folder):
            for path in (
                self._exit_path(name),
                log,
                *log.parent.glob(f"{log.name}.[0-9]"),
                self._record_path(name),
            ):
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._folder.rmdir()
        self._specs.pop(replica_id, None)

    def read_file(self, replica_id: str, path: str, most_bytes: int) -> bytes:
        """Return a file of this machine, where processes see what everybody sees."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb") as file:
                about = os.fstat(descriptor)
                plain = stat.S_ISREG(about.st_mode) and about.st_size <= most_bytes
                return file.read() if plain and self._find(replica_id) is not None else b""
        except OSError:
            return b""

    def _records(self) -> Iterator[_Record]:
        for path in sorted(self._folder.glob("*.json")):
            record = _load(path)
            if (
                record
                and not path.name.endswith(".exit.json")
                and is_ours(record.labels, path.stem, self._owner)
            ):
                yield record

    def _find(self, replica_id: str) -> _Record | None:
        return next((record for record in self._records() if record.id == replica_id), None)

    def _describe(self, record: _Record) -> ReplicaState:
        alive = _alive(record)  # before the exit file: a supervisor writes that and then ends
        name = record.labels[REPLICA_LABEL]
        code = None
        if record.pid and not alive:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                code = int(json.loads(self._exit_path(name).read_text())["exit_code"])
        plan = plan_of(record.labels) or {}
        return ReplicaState(
            id=record.id,
            name=name,
            fleet=record.labels[FLEET_LABEL],
            device=record.labels[DEVICE_LABEL],
            phase="created" if not record.pid else "running" if alive else "exited",
            # A supervisor that left no word was killed, and its child with it.
            exit_code=None if not record.pid or alive else 137 if code is None else code,
            memory_bytes=int(plan.get("memory_bytes", 0)),
            started_at=record.started,
            plan=plan,
        )

    def _record_path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _exit_path(self, name: str) -> Path:
        return self._folder / f"{name}.exit.json"

    def _log_path(self, name: str) -> Path:
        return self._folder / f"{name}.log"


def _alive(record: _Record) -> bool:
    """Return whether the very process that was started still runs: same boot, same pid, same start.

    It must be a supervisor too: replicas can write below the runs folder, and a forged record must not be able to
    point at somebody else's process. A zombie has no command line, so it counts as ended.
    """
    if not record.pid or record.boot != _boot_id():
        return False
    try:
        words = Path(f"/proc/{record.pid}/cmdline").read_bytes().split(b"\0")
        return (
            os.fsencode(supervisor.__file__) in words
            and supervisor.start_time(record.pid) == record.start_time
        )
    except (OSError, ValueError, IndexError):
        return False


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _dump(record: _Record) -> str:
    return json.dumps({name: getattr(record, name) for name in _Record.__dataclass_fields__})


def _load(path: Path) -> _Record | None:
    """Return the record in a file; None for anything else that may lie there."""
    try:
        values: Any = json.loads(path.read_text())
        record = _Record(**values)
        whole = (
            isinstance(record.pid, int)
            and isinstance(record.start_time, int)
            and isinstance(record.labels, dict)
        )
        return record if whole and record.pid >= 0 and record.pid != 1 else None
    except (OSError, ValueError, TypeError):
        return None


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\r")


@contextlib.contextmanager
def _translated(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EngineError(
            f"{error.filename or folder}: {error.strerror or error}; check the runs folder's permissions and free space"
        ) from error
