"""The interface of engines, which run replicas: the protocol, and the types of its arguments and results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from starling.core.units import format_cores

if TYPE_CHECKING:
    from launcher.devices.devices import Device
    from launcher.devices.holders import GpuHolder
    from launcher.devices.inventory import Machine
    from launcher.hosts.host import Host
    from launcher.hosts.usage import Usage

Phase = Literal["created", "running", "paused", "exited"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mount:
    """A path of the host, or a volume of the engine, inside a replica."""

    source: str
    """The path, or the volume's name."""
    target: str
    read_only: bool = True
    kind: Literal["bind", "volume"] = "bind"

    def public(self) -> dict[str, Any]:
        """Return the mount as plain values; a path has no `kind`, which keeps the digests of earlier releases valid."""
        values = {"source": self.source, "target": self.target, "read_only": self.read_only}
        return values if self.kind == "bind" else {"kind": self.kind, **values}


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """An image that the engine has, and what its labels say."""

    name: str = ""
    """The name that the user gave; empty on the local engine."""
    id: str = ""
    trainer: bool = False
    """Whether its label says that it contains Starling's trainer."""
    cuda: str | None = None
    """The CUDA version that its torch was built for, such as `13.0`; None if no label says it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaSpec:
    """The complete description of one replica; two equal specs run the same command on the same device."""

    name: str
    fleet: str
    device: Device
    image: str
    """The image's name as the user gave it; empty on the local engine."""
    image_id: str
    """The id of the image when the plan was made: a rebuilt image changes the spec."""
    command: tuple[str, ...]
    environment: Mapping[str, str]
    """Variables that the launcher sets; none is secret."""
    passed: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The user's variables. Only their names are shown, labelled or hashed."""
    mounts: tuple[Mount, ...] = ()
    runs: Path
    """The host's runs folder."""
    user: str = ""
    """`uid:gid`."""
    cores: tuple[int, ...] = ()
    """The cores that the replica is pinned to; empty: all."""
    memory_bytes: int = 0
    shm_bytes: int = 0
    tmp_bytes: int = 0
    pids_limit: int = 4096
    network: str = "bridge"

    def public(self) -> dict[str, Any]:
        """Return the spec as plain values without secrets, to be shown, labelled, hashed and compared."""
        from starling.core.redaction import masked

        return {
            "replica": self.name,
            "fleet": self.fleet,
            "device": self.device.label,
            "uuids": list(self.device.uuids),
            "image": self.image,
            "image_id": self.image_id,
            "command": [masked(word) for word in self.command],
            "environment": dict(sorted(self.environment.items())),
            "passed_environment": sorted(self.passed),
            "mounts": [mount.public() for mount in self.mounts],
            "runs": str(self.runs),
            "user": self.user,
            "cores": format_cores(self.cores),
            "memory_bytes": self.memory_bytes,
            "shm_bytes": self.shm_bytes,
            "tmp_bytes": self.tmp_bytes,
            "pids_limit": self.pids_limit,
            "network": self.network,
        }

    def public_json(self) -> str:
        """Return `public()` as canonical JSON."""
        return json.dumps(self.public(), sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """SHA-256 of `public_json()`, in hex."""
        return hashlib.sha256(self.public_json().encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaState:
    """The state of one of our replicas, as the engine reports it."""

    id: str
    name: str
    fleet: str
    device: str
    phase: Phase
    exit_code: int | None = None
    """None unless exited, or if the exit code was lost."""
    oom_killed: bool = False
    memory_bytes: int = 0
    started_at: float | None = None
    """Unix seconds."""
    pid: int = 0
    """The PID of the running replica's first process on the engine's machine; 0: unknown."""
    plan: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The `public()` spec that the replica was created from."""

    @property
    def runs(self) -> Path:
        """The host's runs folder."""
        return Path(self.plan["runs"])

    @property
    def live(self) -> bool:
        """Whether the replica holds its device now."""
        return self.phase in ("running", "paused")

    @property
    def stopped(self) -> bool:
        """Whether the replica saved and ended on request: the same `up` resumes it."""
        return self.phase == "exited" and self.exit_code in (130, 143) and not self.oom_killed

    @property
    def well(self) -> bool:
        """Whether the replica runs, has finished, or was stopped by its owner."""
        return self.phase == "running" or self.finished or self.stopped

    @property
    def finished(self) -> bool:
        """Whether the replica succeeded: exit code 0 does not count if a child was killed for lack of memory."""
        return self.phase == "exited" and self.exit_code == 0 and not self.oom_killed


class LogLine(str):
    """A line of a replica's output with its time; callers that ignore the time use it as a plain string."""

    at: float | None
    """Unix seconds by the engine's clock; None if the engine does not report a time."""

    def __new__(cls, text: str, at: float | None = None) -> LogLine:
        """Return the line without its line end."""
        line = super().__new__(cls, text)
        line.at = at
        return line


class Engine(Protocol):
    """Create, start, watch and end replicas. Every method raises EngineError if the engine fails.

    The engine makes the ids and never reuses an id. To end a replica that no longer exists is no error.
    """

    name: str

    @property
    def host(self) -> Host:
        """The machine that its replicas run on."""

    def machine(self) -> Machine:
        """Return the cores and the memory that replicas can have."""

    def resolve_image(self, image: str) -> Image:
        """Return an image that the engine has; never pulls an image."""

    def check_trainer(self, image: Image, script: str) -> None:
        """Raise unless the image contains our trainer, whose command is `script`."""

    def check_gpu_runtime(self, image: Image) -> None:
        """Raise if the engine cannot give a GPU to a replica of this image."""

    def check_network(self, network: str) -> None:
        """Raise unless the network exists."""

    def check_names(self, names: Sequence[str]) -> None:
        """Raise NameTaken if a container or process that is not ours has one of these names."""

    def create(self, spec: ReplicaSpec) -> str:
        """Create a replica without starting it, and return its id; raises NameTaken."""

    def start(self, replica_id: str) -> None:
        """Run a created replica."""

    def list(self) -> list[ReplicaState]:
        """Return our replicas only, sorted by name."""

    def gpu_holders(self) -> Sequence[GpuHolder]:
        """Return all holders of GPUs of this engine, other users' included."""

    def state(self, replica_id: str) -> ReplicaState | None:
        """Return one of our replicas; None if it no longer exists."""

    def environment(self, replica_id: str) -> Mapping[str, str] | None:
        """Return the environment that a replica was started with; None if it is no longer known."""

    def usage(self, states: Sequence[ReplicaState]) -> Mapping[str, Usage]:
        """Return the current usage of running replicas by id; replicas without figures are missing."""

    def logs(
        self, replica_id: str, *, follow: bool = False, tail: int | None = None, since: float | None = None
    ) -> Iterator[LogLine]:
        """Yield lines of output; with `follow`, until the replica ends. Reading never disturbs the replica.

        `since` (Unix seconds) selects lines from that time on; `tail` takes the last of these lines.
        """

    def terminate(self, replica_id: str) -> None:
        """Send SIGTERM."""

    def kill(self, replica_id: str) -> None:
        """Send SIGKILL."""

    def remove(self, replica_id: str) -> None:
        """Kill the replica if it runs, and remove all of its traces from the engine."""

    def read_file(self, replica_id: str, path: str, most_bytes: int) -> bytes:
        """Return a plain file of at most `most_bytes`, as a replica sees it; empty for a link or anything else."""
